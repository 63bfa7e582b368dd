"""Which pod a container is in, and what a replica may be: decided from words alone."""

import pytest

from sandboxfs.errors import SpecError, StateError
from sandboxfs.hooks import pod_record
from sandboxfs.kernel import abi
from sandboxfs.spec import options
from sandboxfs.spec.annotations import pod

CRI = "io.kubernetes.cri.sandbox-id"
CRIO = "io.kubernetes.cri-o.SandboxID"
OWN = "dev.sandboxfs.pod"


@pytest.mark.parametrize(("annotations", "key"), [
    ({}, None),
    ({OWN: ""}, None),
    ({CRI: ""}, None),
    ({OWN: "p1"}, "named-p1"),
    ({CRI: "0a1b"}, "sandbox-0a1b"),
    ({CRIO: "0a1b"}, "sandbox-0a1b"),
    ({CRI: "0a1b", CRIO: "0a1b"}, "sandbox-0a1b"),
    # Whoever writes a pod can't move it by the annotation for those without a runtime's word.
    ({CRI: "0a1b", OWN: "victim"}, "sandbox-0a1b"),
    ({CRIO: "0a1b", OWN: "victim"}, "sandbox-0a1b"),
    ({OWN: "sandbox-0a1b"}, "named-sandbox-0a1b"),
    ({OWN: ".."}, "named-.."),
])
def test_the_runtimes_word_decides(annotations, key):
    found = pod(annotations)
    assert (found and found.key) == key


@pytest.mark.parametrize("annotations", [
    {CRI: "victim", CRIO: "own"}, {CRIO: "victim", CRI: "own"},
])
def test_two_runtimes_words_that_differ_are_refused(annotations):
    """CRI-O passes on what whoever wrote the pod annotated, containerd's key among it."""
    with pytest.raises(SpecError) as refused:
        pod(annotations)
    assert "whose pod this is can't be told" in str(refused.value)
    assert refused.value.origin == f"/annotations/{CRIO}"


@pytest.mark.parametrize("name", [
    "a/b", "../etc", "/", "a\0b", "a b", "a\n", "ä", "a" * 129, "a:b", "\\",
])
@pytest.mark.parametrize("key", [CRI, CRIO, OWN])
def test_an_id_that_is_no_name(key, name):
    with pytest.raises(SpecError) as refused:
        pod({key: name})
    assert "letters, digits, dots, hyphens and underscores only" in str(refused.value)


def attributes(words, master):
    return options.within(options.parse(words), options.parse(master))


ALWAYS = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV


@pytest.mark.parametrize(("words", "master", "expected"), [
    ([], [], ALWAYS),
    (["rw"], ["rw"], ALWAYS),
    (["ro"], [], ALWAYS | abi.MOUNT_ATTR_RDONLY),
    ([], ["ro"], ALWAYS | abi.MOUNT_ATTR_RDONLY),
    (["rro"], [], ALWAYS | abi.MOUNT_ATTR_RDONLY),
    (["noexec"], ["ro"], ALWAYS | abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOEXEC),
    (["exec"], [], ALWAYS),
    ([], ["noatime"], ALWAYS | abi.MOUNT_ATTR_NOATIME),
    (["noatime"], ["noatime"], ALWAYS | abi.MOUNT_ATTR_NOATIME),
    (["noatime"], [], ALWAYS | abi.MOUNT_ATTR_NOATIME),
    (["rw"], ["ro"], None),
    (["rrw"], ["ro"], None),
    (["exec"], ["noexec"], None),
    (["suid"], [], None),
    (["dev"], [], None),
    (["rsuid"], [], None),
    (["relatime"], ["noatime"], None),
    (["strictatime"], ["noatime"], None),
    (["atime"], ["noatime"], None),
    # The last word of a mount wins, whichever it is.
    (["exec", "noexec"], ["noexec"], ALWAYS | abi.MOUNT_ATTR_NOEXEC),
    (["noexec", "exec"], ["noexec"], None),
])
def test_a_replica_is_as_strict_as_its_master_or_stricter(words, master, expected):
    assert attributes(words, master) == expected


def test_a_record_is_what_was_written():
    record = pod_record.Record("p1", True)
    record.masters.append(pod_record.Master(
        'na"me\n\\ä', "/a b", ["size=1", "ro"], True, "0", 17, 4026531840
    ))
    record.containers.append(pod_record.Container("one", 1, 2))
    again = pod_record.decoded(record.encoded(), "where")
    assert again.encoded() == record.encoded()
    assert again.master('na"me\n\\ä').source == "/a b"
    assert again.of_source("/a b").device == 17
    assert again.drop("one") is True
    assert again.drop("one") is False


@pytest.mark.parametrize("change", [
    (b'"size=1"', b"1"), (b'"directory": "0"', b'"directory": "../.."'),
    (b'"directory": "0"', b'"directory": ""'), (b'"pid": 1', b'"pid": -1'),
    (b'"pid": 1', b'"pid": "1"'), (b'"id": "one", ', b""), (b'"version": 1', b'"version": "1"'),
    (b"}\n", b"} more"), (b'"containers": [', b'"containers": ["'),
])
def test_a_record_that_was_changed_is_refused(change):
    record = pod_record.Record("p1", True)
    record.masters.append(pod_record.Master("cache", "/a", ["size=1"], True, "0", 17, 1))
    record.containers.append(pod_record.Container("one", 1, 2))
    content = record.encoded()
    assert change[0] in content
    with pytest.raises(StateError) as refused:
        pod_record.decoded(content.replace(*change), "where")
    assert str(refused.value).startswith("read where: ")
