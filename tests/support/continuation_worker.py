"""A Celery worker whose tiny preset declares the tasks of clips that begin with given frames."""

import sys

from omnivideo.cli.main import main
from tests.support.continuations import declare_everywhere

if __name__ == "__main__":
    sys.argv = ["omnivideo", "worker", "--device", "cpu"]
    with declare_everywhere():
        main()
