"""Fetch the public MiniMind data sets into dataset/, from Hugging Face, its mirror, or ModelScope.

    python dataset/download.py --list
    python dataset/download.py --source modelscope --files pretrain_t2t_mini.jsonl sft_t2t_mini.jsonl
    python dataset/download.py --base_url https://example.org/data --files my.jsonl --sha256 my.jsonl=<64 hex
    digits>

Plain HTTP(S) with the standard library. An interrupted download goes on where it stopped (FILE.part), its
checksum is compared with the server's, the manifest's or yours, and FILE appears only when it is whole and
right. Data written here is never committed. Licences are those of the data sets: see docs/data.md.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SOURCES = {
    "hf": "https://huggingface.co/datasets/jingyaogong/minimind_dataset/resolve/main",
    "hf-mirror": "https://hf-mirror.com/datasets/jingyaogong/minimind_dataset/resolve/main",
    "modelscope": "https://www.modelscope.cn/datasets/gongjy/minimind_dataset/resolve/master",
}
# name: (size as published, for orientation; what it is; stage)
KNOWN_FILES = {
    "pretrain_t2t_mini.jsonl": ("1.2 GB", "pretraining, small", "train_pretrain.py"),
    "pretrain_t2t.jsonl": ("10 GB", "pretraining, full", "train_pretrain.py"),
    "sft_t2t_mini.jsonl": ("1.6 GB", "conversations with tools and reasoning, small", "train_full_sft.py"),
    "sft_t2t.jsonl": ("14 GB", "conversations with tools and reasoning, full", "train_full_sft.py"),
    "dpo.jsonl": ("53 MB", "preference pairs", "train_dpo.py"),
    "rlaif.jsonl": ("24 MB", "prompts for PPO/GRPO/SPO", "train_grpo.py"),
    "agent_rl.jsonl": ("86 MB", "tool-use tasks with expected values", "train_agent.py"),
    "agent_rl_math.jsonl": ("18 MB", "arithmetic tool-use tasks", "train_agent.py"),
    "lora_identity.jsonl": ("23 KB", "who the model is", "train_lora.py"),
    "lora_medical.jsonl": ("34 MB", "medical questions (Chinese)", "train_lora.py"),
    "pretrain_hq.jsonl": ("1.6 GB", "pretraining of MiniMind2", "train_pretrain.py"),
    "sft_mini_512.jsonl": ("1.2 GB", "short conversations of MiniMind2", "train_full_sft.py"),
    "sft_512.jsonl": ("7.5 GB", "conversations of MiniMind2", "train_full_sft.py"),
    "sft_1024.jsonl": ("5.6 GB", "longer conversations of MiniMind2", "train_full_sft.py"),
    "sft_2048.jsonl": ("9 GB", "long conversations of MiniMind2", "train_full_sft.py"),
    "r1_mix_1024.jsonl": ("340 MB", "reasoning traces of MiniMind2", "train_reason.py"),
    "rlaif-mini.jsonl": ("1 MB", "10,000 prompts of MiniMind2", "train_grpo.py"),
}
DEFAULT_FILES = ("pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl")
CHUNK = 1 << 18
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(Exception):
    """One line: what, where, and what to do."""


def download(url, target, *, sha256=None, retries=5, timeout=30, wait=1.0, show=None):
    """Fetch `url` to `target` and return the SHA-256 of what was written.

    sha256: the expected checksum; else the server's is used where it tells one. Resumes `target`.part if the
    server says the file is still the same. retries: attempts in a row without a new byte. Raises
    DownloadError.
    """
    target = Path(target)
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures, told = 0, {}
    while True:
        size_before = part.stat().st_size if part.exists() else 0
        try:
            told = _fetch(url, part, note, timeout, show or (lambda *_: None))
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and size_before:  # the part is as long as the file or longer: start over
                part.unlink()
            elif error.code not in TRY_AGAIN:
                raise DownloadError(_refused(url, error.code)) from None
            reason = f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise DownloadError("the disk is full: free some space; running again continues") from None
            reason = getattr(error, "reason", None) or error or type(error).__name__
        grown = part.exists() and part.stat().st_size > size_before
        failures = 0 if grown else failures + 1
        if failures > retries:
            raise DownloadError(
                f"{url}: {reason}, {failures} times in a row. Check the network, or try another --source; "
                f"running again continues where it stopped"
            )
        pause = min(wait * 2**failures, 60)
        print(f"\n{target.name}: {reason}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    found = sha256_of(part)
    expected = (sha256 or told.get("sha256") or "").lower()
    if expected and found != expected:
        for file in (part, note):
            file.unlink(missing_ok=True)
        raise DownloadError(
            f"{url}: the checksum is {found}, expected {expected}. The file was removed: run again; "
            "if it happens twice, try another --source"
        )
    os.replace(part, target)
    note.unlink(missing_ok=True)
    return found


def _fetch(url, part, note, timeout, show):
    """One attempt, continuing `part`. Returns what the server told: size, sha256 or etag."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "minimind-download/1.0", "Accept-Encoding": "identity"}
    known = {}
    if have and note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
    if have and known.get("url") == url and known.get("total") == have:
        return known  # whole; only the renaming is left
    if have and known.get("url") == url:
        headers["Range"] = f"bytes={have}-"
    elif have:
        part.unlink()  # of unknown origin
        have = 0
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        told = {**_told(response.headers), **getattr(response, "told_on_the_way", {})}
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != have or _changed(known, told):
                part.unlink()
                raise OSError("the file on the server changed, starting over")
            total = int(match[2]) if match[2] != "*" else None
        else:
            have = 0  # the server sends the whole file, whatever was asked
            total = (
                int(response.headers["Content-Length"]) if response.headers.get("Content-Length") else None
            )
        _need_space(part, (total or 0) - have)
        note.write_text(json.dumps({"url": url, "total": total, **told}), encoding="utf-8")
        with part.open("ab" if have else "wb") as file:
            show(have, total)
            while data := response.read(CHUNK):
                file.write(data)
                have += len(data)
                show(have, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and have < total:
            raise OSError(f"the connection ended after {have:,} of {total:,} bytes")
    return told


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Hugging Face names the checksum (X-Linked-Etag) in the redirect to its storage, not there: carry it
    along."""

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise DownloadError(f"{request.full_url} redirects to {newurl}, which is not HTTP")
        new = super().redirect_request(request, fp, code, msg, headers, newurl)
        if new is not None:
            new.told_on_the_way = {**_told(headers), **getattr(request, "told_on_the_way", {})}
        return new

    def http_response(self, request, response):
        response.told_on_the_way = getattr(request, "told_on_the_way", {})
        return response

    https_response = http_response


def _told(headers):
    """The SHA-256 of the content if the headers name it, and the ETag, which only shows a change."""
    told = {}
    for name in ("X-Linked-Etag", "X-Checksum-Sha256"):
        value = (headers.get(name) or "").removeprefix("W/").strip('"')
        if re.fullmatch("[0-9a-fA-F]{64}", value):
            told["sha256"] = value.lower()
    if headers.get("ETag"):
        told["etag"] = headers["ETag"].removeprefix("W/").strip('"')
    return told


def _changed(before, now):
    return any(name in before and name in now and before[name] != now[name] for name in ("sha256", "etag"))


def _need_space(part, num_bytes):
    free = shutil.disk_usage(part.parent).free
    if num_bytes > free:
        raise DownloadError(
            f"{part.parent} has {free / 1e9:.1f} GB free and {num_bytes / 1e9:.1f} GB are to come: "
            "free some space, or choose another folder with --out"
        )


def _refused(url, code):
    remedy = {
        401: "the server wants a login: use another --source",
        403: "the server refuses: use another --source",
        404: "no such file there: check the name with --list, or use another --source",
    }
    return f"{url}: HTTP {code}; {remedy.get(code, 'try another --source')}"


def sha256_of(path):
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


class Progress:
    """`show` for download: one line, rewritten on a terminal, else every 10 seconds."""

    def __init__(self, name):
        self.name, self.start, self.first, self.last = name, time.monotonic(), None, 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, have, total):
        now = time.monotonic()
        if self.first is None or have < self.first:
            self.first, self.start = have, now  # what an earlier run fetched does not count for the speed
        done = have == total
        if now - self.last < (0.2 if self.terminal else 10) and not done:
            return
        self.last = now
        rate = (have - self.first) / max(now - self.start, 1e-3)
        line = f"{self.name}: {have / 1e6:,.1f}"
        if total:
            left = (total - have) / rate if rate else float("inf")
            line += f" of {total / 1e6:,.1f} MB ({100 * have / total:.0f}%), {rate / 1e6:.1f} MB/s"
            line += f", {left:,.0f} s left" if left < 1e6 else ""
        else:
            line += f" MB, {rate / 1e6:.1f} MB/s"
        end = "" if self.terminal and not done else "\n"
        print(f"\r{line}\x1b[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def read_manifest(text):
    """{name: sha256} from lines of `sha256sum`, or from JSON {"name": "sha256"}."""
    if text.lstrip().startswith("{"):
        return {name: str(value).lower() for name, value in json.loads(text).items()}
    lines = (
        line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")
    )
    return {name.lstrip("*").strip(): digest.lower() for digest, name in lines}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", nargs="+", default=list(DEFAULT_FILES), metavar="NAME",
                        help=f"files to fetch (default: {' '.join(DEFAULT_FILES)}); see --list")  # fmt: skip
    parser.add_argument("--source", choices=list(SOURCES), default="hf", help="where from (default: hf)")
    parser.add_argument("--base_url", help="fetch BASE_URL/NAME instead of from --source")
    parser.add_argument("--out", default=str(REPO / "dataset"), help="folder to write to (default: dataset/)")
    parser.add_argument("--sha256", nargs="+", default=[], metavar="NAME=HEX", help="expected checksums")
    parser.add_argument(
        "--manifest", help="file of expected checksums (lines of sha256sum, or JSON name -> hex)"
    )
    parser.add_argument(
        "--retries", type=int, default=5, help="attempts in a row without progress (default: 5)"
    )
    parser.add_argument("--timeout", type=float, default=30, help="seconds without an answer (default: 30)")
    parser.add_argument("--force", action="store_true", help="fetch again what is already there")
    parser.add_argument("--list", action="store_true", help="list the known files and end")
    return parser.parse_args(argv)


def main(args):
    if args.list:
        for name, (size, what, stage) in KNOWN_FILES.items():
            print(f"{name:26} {size:>7}  {what} ({stage})")
        return 0
    checksums = read_manifest(Path(args.manifest).read_text(encoding="utf-8")) if args.manifest else {}
    for item in args.sha256:
        name, _, digest = item.rpartition("=")
        if not re.fullmatch("[0-9a-fA-F]{64}", digest) or not name:
            raise SystemExit(f"--sha256 {item}: write NAME=<64 hex digits>")
        checksums[name] = digest.lower()
    base = (args.base_url or SOURCES[args.source]).rstrip("/")
    if urllib.parse.urlsplit(base).scheme not in ("http", "https"):
        raise SystemExit(f"--base_url {base}: it must begin with http:// or https://")
    for name in args.files:
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", name) or ".." in name.split("/"):
            raise SystemExit(f"--files {name}: a plain file name is expected")
        if not args.base_url and name not in KNOWN_FILES:
            print(f"{name} is not a known file (see --list); trying", file=sys.stderr)
        target = Path(args.out) / Path(name).name
        if target.exists() and not args.force:
            if name in checksums and sha256_of(target) != checksums[name]:
                raise SystemExit(f"{target} exists with another checksum: remove it, or pass --force")
            print(f"{target} is there already (--force fetches it again)")
            continue
        try:
            digest = download(
                f"{base}/{urllib.parse.quote(name)}",
                target,
                sha256=checksums.get(name),
                retries=args.retries,
                timeout=args.timeout,
                show=Progress(name),
            )
        except DownloadError as error:
            raise SystemExit(f"error: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped; the same command continues {name}") from None
        print(f"{target}  sha256 {digest}")
    print(f"check a file with: python dataset/check_data.py {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
