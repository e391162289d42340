"""sitecustomize of Ray's workers in the tests: images that crash or delay a worker, depending on their last bytes.

KILL    ends the process that decodes it         RAISE   raises an unexpected exception
DIES    ends only the first process              SLOW    takes a while
LEDGER  ends the actor that records what each worker does
"""

from __future__ import annotations

SITE = """
import importlib.util, os, signal, sys, time
from contextlib import suppress
from pathlib import Path

# The ledger actor of this cluster is the process ray::Ledger whose environment contains this folder.
def end_ledger():
    ended = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            named = (process / "cmdline").read_bytes().startswith(b"ray::Ledger")
            if named and os.fsencode(Path(__file__).parent) in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                ended += 1
    assert ended == 1, ended

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name != "cloudrt.images.decoding":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.load_image = harm(module.load_image)
        spec.loader.exec_module = exec_module
        return spec

def harm(real):
    def load_image(source, *rest):
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except (OSError, TypeError):
            return real(source, *rest)
        flag = Path(str(source) + ".died")
        if data.endswith(b"KILL") or (data.endswith(b"DIES") and not flag.exists()):
            if data.endswith(b"DIES"):
                flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if data.endswith(b"LEDGER"):
            end_ledger()
        if data.endswith(b"RAISE"):
            raise RuntimeError("a fault of the decoder")
        if data.endswith(b"SLOW"):
            time.sleep(0.5)
        ending = next((word for word in (b"DIES", b"SLOW", b"LEDGER") if data.endswith(word)), b"")
        return real(data.removesuffix(ending), *rest)
    return load_image

sys.meta_path.insert(0, Watch())
"""
