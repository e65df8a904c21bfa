"""The API and its maintenance commands run with the packages of the API image alone."""

import subprocess
import sys

from tests.deploy.test_deploy import NOT_IN_API

# `tokenizers` and `jinja2` come with packages that the image lacks.
MISSING = sorted({name.replace("-", "_") for name in NOT_IN_API} | {"tokenizers", "jinja2", "vllm"})
PROGRAM = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import omnivideo.api.app
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring

# A preset without shipped weights, as in the image, which has none.
servers = {"broker": "redis://127.0.0.1:9", "mllm": "http://127.0.0.1:9"}
wiring = ServiceWiring(load_settings(home=sys.argv[1], preset="omnivideo-1.3b", **servers))
context = wiring.build_service_context()
omnivideo.api.app.create_app(context)
assert context.text_limits.check_prompt("prompt", " a red ball ", None) == "a red ball"
wiring.conversations.open_thread("kept", create=True)
# The sweep's container has no broker, and reads every thread.
sweeping = ServiceWiring(load_settings(home=sys.argv[1], preset="omnivideo-1.3b", mllm=servers["mllm"]))
assert sweeping.sweep().object_keys == []
print("built")
"""


def test_the_api_needs_nothing_that_its_image_lacks(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), ",".join(MISSING)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "built\n", done.stderr[-3000:]
