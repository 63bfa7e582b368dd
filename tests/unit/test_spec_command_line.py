"""What a command line makes of a document that lacks something."""

import json

from sandboxfs.cli import run


def test_a_command_for_a_document_without_a_process(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}}))
    spec = run.load(run.parse(["--bundle", str(tmp_path), "--", "ls", "-l"]))
    assert spec.process.args == ["ls", "-l"]
    assert spec.process.cwd == "/"
