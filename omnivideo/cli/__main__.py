"""Run the command line: `python -m omnivideo.cli`."""

from omnivideo.cli.main import main

if __name__ == "__main__":
    main()
