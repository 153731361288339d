"""One contestant in a process of its own: builds, then steps when told to.

Reads lines from stdin, `step N` or `stop`; answers each with a line of JSON on stdout.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time

import psutil

from svend.bench.spec import Contestant, Spec

CONTESTANTS = {
    "svend": "svend.bench.ours:svend_compiled",
    "svend-eager": "svend.bench.ours:svend_eager",
    "hf-stock": "svend.bench.peers:hugging_face_stock",
    "hf-compiled": "svend.bench.peers:hugging_face_compiled",
    "hf-master": "svend.bench.peers:hugging_face_master",
    "litgpt": "svend.bench.peers:litgpt_own",
}


def main(name: str, spec_json: str) -> None:
    """Build the contestant, make its first step, and serve until told to stop."""
    # Whatever a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    spec = Spec.from_json(spec_json)
    module, function = CONTESTANTS[name].split(":")
    contestant: Contestant = getattr(importlib.import_module(module), function)(spec)
    contestant.step()
    _synchronize(spec)
    started = psutil.Process().create_time()
    first = {"parameters": contestant.parameters, "first_step_seconds": time.time() - started}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "stop":
            break
        tokens, start = 0, time.perf_counter()
        for _ in range(int(rest[0])):
            tokens += contestant.step()
        _synchronize(spec)
        seconds = time.perf_counter() - start
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers, flush=True)
    print(json.dumps({"peak_bytes": _peak_bytes(spec)}), file=answers, flush=True)


def _synchronize(spec: Spec) -> None:
    if spec.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_bytes(spec: Spec) -> int:
    if spec.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
