"""`python -m hftl` is `hftl`."""

from hftl.cli import main

if __name__ == "__main__":
    main()
