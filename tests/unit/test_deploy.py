"""The files for Kubernetes, by Kubernetes' own schemas, and by what they have in common."""

import kubernetes_validate
import pytest
import yaml

from sandboxfs.engines import containerd, crio
from sandboxfs.spec import annotations
from tests.support import CHECKOUT

FILES = sorted((CHECKOUT / "deploy").glob("*.yaml"))
DOCUMENTS = {document["kind"]: document for path in FILES
             for document in yaml.safe_load_all(path.read_text("utf-8"))}


def test_there_are_some():
    assert DOCUMENTS.keys() == {"DaemonSet", "Namespace", "Pod", "RuntimeClass"}


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_file_is_as_kubernetes_says(name, version):
    kubernetes_validate.validate(DOCUMENTS[name], version, strict=True)


def test_the_schemas_find_faults():
    document = {**DOCUMENTS["RuntimeClass"], "handlers": "x"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_names_are_those_that_are_installed():
    runtime_class = DOCUMENTS["RuntimeClass"]
    assert runtime_class["handler"] == containerd.HANDLER == crio.HANDLER
    pod = DOCUMENTS["Pod"]
    assert pod["spec"]["runtimeClassName"] == runtime_class["metadata"]["name"]
    for name in pod["metadata"]["annotations"]:
        assert name.removeprefix("dev.sandboxfs.") in annotations._KEYS
