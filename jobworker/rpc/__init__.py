"""What clients see: the gRPC service, who calls it, and how values cross the wire."""
