"""`python -m evenflow`, which is also what `torchrun -m evenflow train ...` starts on each rank."""

from evenflow.cli.main import main

if __name__ == "__main__":
    main()
