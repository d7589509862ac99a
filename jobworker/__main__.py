"""`python -m jobworker` is the program `jobworker`."""

from jobworker.cli.main import main

if __name__ == "__main__":
    main(prog_name="jobworker")
