"""Write small copies of finished checkpoints, to share them: python -m training.pretrained checkpoints/*.pt

The copies work like the originals with main_ens.py, predict.py, export.py and --init, but their runs cannot be resumed.
The weights of the convolutions are stored in bfloat16. With --precision bfloat16 the logits are exactly the same,
because these weights are rounded to bfloat16 anyway; in float32 they differ slightly.
"""

import hashlib
from pathlib import Path
from typing import Any

from common import errors, files
from common.command_line import Parser
from common.errors import UserError

import torch

from training import checkpoint


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="checkpoint of a finished run")
    parser.add_argument("--output", type=Path, default=Path("pretrained"), help="folder (default: pretrained)")
    options = parser.parse_args()
    copies = {options.output / path.name: small_copy(path) for path in options.checkpoints}
    if len(copies) < len(options.checkpoints):
        raise UserError("two of the checkpoints have the same file name; copy each to its own --output")
    if existing := [path for path in copies if path.exists()]:
        raise UserError(f"{existing[0]} already exists; delete it, or give another --output")
    files.check_writable(options.output, "the copies")
    for path, content in copies.items():
        checkpoint.write(path, content)
        raw = path.read_bytes()
        print(f"{path}: {len(raw) / 1e6:.1f} MB, sha256 {hashlib.sha256(raw).hexdigest()}")
    return 0


def small_copy(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without what only a resumed run needs. Raises UserError for an unfinished run."""
    content = checkpoint.read(path)
    if not content["finished"]:
        raise UserError(f"{path} is not finished; resume its run first")
    weights = {name: value.to(torch.bfloat16) if value.ndim == 4 else value for name, value in content["model"].items()}
    return {name: value for name, value in content.items() if name != "digest"} | {"model": weights, "training": None}


if __name__ == "__main__":
    errors.run(main)
