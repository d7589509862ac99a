"""Generates the messages of proto/job_worker.proto: `generate_pb.py FOLDER`.

Only messages, no stubs of services: the server registers its methods in a table of its
own, and the client has one too. The proto file is named without its folder, so that it
is "job_worker.proto" to reflection, as it always was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO_FOLDER = Path(__file__).parent.parent / "proto"


def main() -> int:
    folder = sys.argv[1]
    return int(
        protoc.main(
            [
                "protoc",
                f"--proto_path={PROTO_FOLDER}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                "job_worker.proto",
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
