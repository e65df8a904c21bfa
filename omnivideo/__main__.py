"""Run the command line: `python -m omnivideo`."""

from omnivideo.cli.main import main

if __name__ == "__main__":
    main()
