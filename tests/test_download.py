import hashlib
import http.server
import json
import random
import subprocess
import sys
import threading

import pytest
from data_helpers import REPO

from dataset import download

CONTENT = random.Random(0).randbytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under any name, with the faults the test asks for."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        plan = self.server.plan
        self.server.requests.append((self.path, self.headers.get("Range")))
        if plan["statuses"]:
            status = plan["statuses"].pop(0)
            if status != 200:
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/storage" + self.path)
                    self.send_header("X-Linked-Etag", f'"{plan.get("linked", SHA)}"')
                self.end_headers()
                return
        content, start = plan["content"], 0
        asked = self.headers.get("Range")
        if asked and plan["ranges"]:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        for name, value in plan["headers"].items():
            self.send_header(name, value)
        self.end_headers()
        stop = plan["drops"].pop(0) if plan["drops"] else len(content)
        self.wfile.write(content[start : max(stop, start)])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan = {"content": CONTENT, "ranges": True, "headers": {}, "drops": [], "statuses": []}
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, target, **options):
    return download.download(f"{server.url}/data.jsonl", target, wait=0.0, timeout=5, **options)


def ranges(server):
    return [asked for _, asked in server.requests]


def files_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_arrives_whole_and_its_checksum_is_returned(server, tmp_path):
    assert fetch(server, tmp_path / "new" / "data.jsonl") == SHA
    assert (tmp_path / "new" / "data.jsonl").read_bytes() == CONTENT
    assert files_in(tmp_path / "new") == ["data.jsonl"]


def test_a_dropped_connection_continues_where_it_stopped(server, tmp_path):
    server.plan["drops"] = [1_000_000, 2_500_000]
    assert fetch(server, tmp_path / "data.jsonl", sha256=SHA) == SHA
    assert ranges(server) == [None, "bytes=1000000-", "bytes=2500000-"]


def test_a_later_run_continues_the_part_of_an_earlier_one(server, tmp_path):
    server.plan["drops"] = [1_200_000]
    with pytest.raises(download.DownloadError, match="ended after 1,200,000 of 3,000,000 bytes.*again"):
        server.plan["statuses"] = [200, 503]
        fetch(server, tmp_path / "data.jsonl", retries=-1)
    assert files_in(tmp_path) == ["data.jsonl.part", "data.jsonl.part.json"]
    server.plan["statuses"] = []
    fetch(server, tmp_path / "data.jsonl", sha256=SHA)
    assert ranges(server)[-1] == "bytes=1200000-" and files_in(tmp_path) == ["data.jsonl"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.plan.update(ranges=False, drops=[1_000_000])
    assert fetch(server, tmp_path / "data.jsonl", sha256=SHA) == SHA


def test_a_file_that_changed_on_the_server_is_not_mixed_with_the_old_part(server, tmp_path):
    server.plan.update(drops=[1_000_000], headers={"ETag": '"one"'})
    with pytest.raises(download.DownloadError):
        fetch(server, tmp_path / "data.jsonl", retries=-1)
    server.plan.update(content=CONTENT[::-1], headers={"ETag": '"two"'})
    fetch(server, tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT[::-1]


def test_a_part_that_is_already_whole_is_only_checked_and_renamed(server, tmp_path):
    (tmp_path / "data.jsonl.part").write_bytes(CONTENT)
    note = {"url": f"{server.url}/data.jsonl", "total": len(CONTENT), "sha256": SHA}
    (tmp_path / "data.jsonl.part.json").write_text(json.dumps(note))
    assert fetch(server, tmp_path / "data.jsonl") == SHA and server.requests == []


def test_a_part_of_unknown_origin_is_not_used(server, tmp_path):
    (tmp_path / "data.jsonl.part").write_bytes(b"something else")
    assert fetch(server, tmp_path / "data.jsonl", sha256=SHA) == SHA
    assert ranges(server) == [None]


@pytest.mark.parametrize("told_by", ["user", "server", "redirect"])
def test_a_wrong_checksum_leaves_no_file(server, tmp_path, told_by):
    wrong = "0" * 64
    if told_by == "server":
        server.plan["headers"] = {"X-Checksum-Sha256": wrong}
    if told_by == "redirect":
        server.plan.update(statuses=[302], linked=wrong)
    with pytest.raises(download.DownloadError, match=f"is {SHA}, expected {wrong}.*another --source"):
        fetch(server, tmp_path / "data.jsonl", sha256=wrong if told_by == "user" else None)
    assert files_in(tmp_path) == []


def test_the_checksum_of_a_redirect_is_compared(server, tmp_path):
    """Hugging Face names it on the way to its storage, whose own ETag is something else."""
    server.plan.update(statuses=[302], headers={"ETag": f'"{"a" * 64}"'})
    assert fetch(server, tmp_path / "data.jsonl") == SHA
    assert [path for path, _ in server.requests] == ["/data.jsonl", "/storage/data.jsonl"]


def test_a_missing_file_is_an_error_at_once(server, tmp_path):
    server.plan["statuses"] = [404]
    with pytest.raises(download.DownloadError, match="HTTP 404; no such file there"):
        fetch(server, tmp_path / "data.jsonl")
    assert len(server.requests) == 1 and files_in(tmp_path) == []


def test_a_busy_server_is_asked_again_but_not_for_ever(server, tmp_path):
    server.plan["statuses"] = [503, 429, 500]
    assert fetch(server, tmp_path / "data.jsonl") == SHA
    server.plan["statuses"] = [503] * 9
    with pytest.raises(download.DownloadError, match="HTTP 503, 3 times in a row"):
        fetch(server, tmp_path / "other.jsonl", retries=2)


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(download.DownloadError, match="free some space"):
        fetch(server, tmp_path / "data.jsonl")


def test_no_server_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(download.DownloadError, match="Check the network"):
        download.download("http://127.0.0.1:9/x", tmp_path / "x", retries=0, wait=0, timeout=2)


def run(server, tmp_path, *arguments):
    args = download.parse_args(["--base_url", server.url, "--out", str(tmp_path), *arguments])
    return download.main(args)


def test_the_command_fetches_checks_and_skips_what_is_there(server, tmp_path, capsys):
    (tmp_path / "sums.txt").write_text(f"{SHA}  a.jsonl\n{SHA} *b.jsonl\n")
    sums = str(tmp_path / "sums.txt")
    assert run(server, tmp_path, "--files", "a.jsonl", "b.jsonl", "--manifest", sums) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == CONTENT
    before = len(server.requests)
    assert run(server, tmp_path, "--files", "a.jsonl", "--sha256", f"a.jsonl={SHA}") == 0
    assert len(server.requests) == before and "is there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists with another checksum"):
        run(server, tmp_path, "--files", "a.jsonl", "--sha256", "a.jsonl=" + "0" * 64)
    with pytest.raises(SystemExit, match="plain file name"):
        run(server, tmp_path, "--files", "../a.jsonl")
    with pytest.raises(SystemExit, match="64 hex digits"):
        run(server, tmp_path, "--files", "a.jsonl", "--sha256", "a.jsonl=abc")
    with pytest.raises(SystemExit, match="must begin with http"):
        download.main(download.parse_args(["--base_url", "file:///etc", "--files", "passwd"]))


def test_manifests_are_read_in_both_forms():
    assert download.read_manifest('{"a": "AB"}') == download.read_manifest("# sums\nAB  a\n") == {"a": "ab"}


def test_every_source_names_the_file_and_the_list_is_printed_without_network(capsys):
    assert set(download.SOURCES) == {"hf", "hf-mirror", "modelscope"}
    assert set(download.DEFAULT_FILES) <= set(download.KNOWN_FILES)
    assert download.main(download.parse_args(["--list"])) == 0
    assert "pretrain_t2t_mini.jsonl" in capsys.readouterr().out


def test_the_script_runs_from_any_directory(tmp_path):
    command = [sys.executable, str(REPO / "dataset" / "download.py"), "--list"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "dpo.jsonl" in done.stdout
