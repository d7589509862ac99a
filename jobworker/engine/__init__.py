"""What runs jobs on this machine: the manager decides, its neighbours do."""
