"""What people type: one program, `jobworker`. A command imports what it needs, and no more."""
