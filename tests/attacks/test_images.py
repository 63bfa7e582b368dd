"""An image, a volume or the host's /dev and /proc are not what they should be."""

import os
import stat

import pytest

from tests.attacks.tools import ENGINES, bind_mount, entries
from tests.support import default_spec, minimal_spec, run, run_cli, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox")

PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


@pytest.fixture
def volume(public_path):
    path = public_path / "volume"
    path.mkdir()
    return path


@pytest.fixture
def secret(public_path):
    path = public_path / "secret"
    path.mkdir()
    (path / "key").write_text("of the host\n")
    return path


def cgroup2(command):
    """Return a command that sees cgroup2 alone, as crun wants it, in mounts of its own."""
    return f"mount -t cgroup2 none /sys/fs/cgroup && {command}"


def in_private_mounts(command):
    return run("unshare", "-m", "sh", "-c", f"mount --make-rprivate / && {command}")


def other_runtime(name, public_path, bundle):
    arguments = f"--root {public_path}/state run --bundle {bundle.path} attack-{os.getpid()}"
    if name == "crun":
        return cgroup2(f"crun --cgroup-manager=disabled {arguments}")
    return f"{name} {arguments}"


def sandboxfs(bundle, engine="detached"):
    from tests.support import LAUNCHER

    return f"{LAUNCHER} run --bundle {bundle.path} --engine {engine}"


# -- /dev is a symlink -----------------------------------------------------------------------


def link_dev_to_the_volume(bundle, volume, *namespaces):
    document = minimal_spec()
    document["linux"]["namespaces"] += [{"type": kind} for kind in ("pid", *namespaces)]
    document["mounts"] = [PROC, bind_mount(volume, "/volume")]
    made = bundle(document)
    (made.rootfs / "dev").rmdir()
    (made.rootfs / "dev").symlink_to("/volume")
    return made


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("namespaces", [(), ("user",)])
def test_no_node_is_made_through_a_symlinked_dev(bundle, volume, engine, namespaces):
    made = link_dev_to_the_volume(bundle, volume, *namespaces)
    done = run_cli("run", "--bundle", made, "--engine", engine, check=125)
    assert entries(volume) == []
    assert done.stderr.startswith("sandboxfs: default: openat2 /dev/null: ELOOP: ")


@pytest.mark.needs("runc")
def test_runc_makes_nodes_through_a_symlinked_dev(bundle, volume, public_path):
    """The control (runc CVE-2026-41579)."""
    made = link_dev_to_the_volume(bundle, volume)
    in_private_mounts(other_runtime("runc", public_path, made))
    assert stat.S_ISCHR((volume / "null").stat().st_mode)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_console_is_not_made_through_a_symlink(bundle, volume, engine):
    document = minimal_spec("/bin/true")
    document["process"]["terminal"] = True
    document["mounts"] = [
        bind_mount(volume, "/volume"),
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["newinstance", "ptmxmode=0666"]},
    ]
    made = bundle(document)
    (made.rootfs / "dev" / "console").symlink_to("/volume/console")
    run_cli("run", "--bundle", made, "--engine", engine, check=125)
    assert entries(volume) == []


# -- what masks are made of ------------------------------------------------------------------


def masked_secret(bundle):
    document = minimal_spec("/bin/cat", "/secret")
    document["linux"]["namespaces"].append({"type": "pid"})
    document["linux"]["maskedPaths"] = ["/secret"]
    document["mounts"] = [PROC]
    made = bundle(document)
    (made.rootfs / "secret").write_text("secret\n")
    return made


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["file", "/dev/zero", "link"])
def test_a_replaced_null_device_masks_nothing(bundle, public_path, engine, source):
    made = masked_secret(bundle)
    if source == "file":
        source = public_path / "fake"
        source.write_text("fake\n")
    if source == "link":
        # A private /dev in which null is a link to another device.
        replace = ("mount -t tmpfs none /dev && mknod -m 666 /dev/full c 1 7"
                   " && ln -s full /dev/null")
    else:
        replace = f"mount --bind {source} /dev/null"
    done = in_private_mounts(f"{replace} && {sandboxfs(made, engine)}")
    assert (done.returncode, done.stdout) == (125, "")
    assert "not the device c 1:3" in done.stderr


@pytest.mark.needs("crun")
def test_crun_masks_with_what_there_is(bundle, public_path):
    """The control (crun CVE-2026-88265)."""
    made = masked_secret(bundle)
    fake = public_path / "fake"
    fake.write_text("fake\n")
    command = other_runtime("crun", public_path, made)
    done = in_private_mounts(f"mount --bind {fake} /dev/null && {command}")
    assert done.stdout == "fake\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_and_readonly_paths_hold_for_whole_trees(bundle, public_path, engine):
    tree = public_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").write_text("inner\n")

    def change(document):
        document["mounts"] += [
            bind_mount(tree, "/hidden"), bind_mount(tree, "/hidden/inner"),
            bind_mount(tree, "/sealed"),
            {"destination": "/sealed/inner", "type": "tmpfs", "source": "tmpfs"},
        ]
        document["linux"]["maskedPaths"] += ["/hidden"]
        document["linux"]["readonlyPaths"] += ["/sealed"]
        document["process"]["args"] = [
            "/bin/sh", "-c", "ls /hidden; touch /hidden/x; touch /sealed/x; touch /sealed/inner/x"]

    with untouched(tree):
        done = run_cli("run", "--bundle", bundle(change), "--engine", engine, check=1)
    assert done.stdout == ""
    assert done.stderr.count("Read-only file system") == 3


# -- procfs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("path", "target"), [
    ("proc", "/volume"), ("proc", "volume"), ("proc", "/proc/self/root"), ("sys", "/volume"),
])
def test_procfs_and_sysfs_are_mounted_on_real_directories(
    bundle, volume, engine, path, target
):
    made = bundle(default_spec())
    made.document["mounts"].insert(0, bind_mount(volume, "/volume"))
    made.write(made.document)
    (made.rootfs / path).rmdir()
    (made.rootfs / path).symlink_to(target)
    done = run_cli("run", "--bundle", made, "--engine", engine, check=125)
    assert f" /{path}: ELOOP: " in done.stderr
    assert entries(volume) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("target", [
    "/proc/self/fd/0", "/proc/self/exe", "/proc/self/root/tmp", "/proc/self/cwd",
    "/proc/self/fd/4/..",
])
def test_a_destination_is_not_taken_through_links_of_procfs(
    bundle, secret, engine, target
):
    made = bundle(default_spec())
    made.document["mounts"].append(bind_mount(secret, "/link/inside"))
    made.write(made.document)
    (made.rootfs / "link").symlink_to(target)
    done = run_cli("run", "--bundle", made, "--engine", engine, check=125)
    assert "mounts[7]: " in done.stderr
    assert done.stderr.count("\n") <= 2


FAKES = ["mount -t tmpfs none {path}", "mount --bind {fake} {path}"]


@pytest.mark.parametrize("fake", FAKES)
def test_sysctls_are_written_to_procfs_alone(bundle, public_path, fake):
    def change(document):
        document["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}

    made = bundle(change)
    directory = public_path / "fake"
    (directory / "net" / "ipv4").mkdir(parents=True)
    target = directory / "net" / "ipv4" / "ip_forward"
    target.write_text("untouched")
    mount = fake.format(path="/proc/sys", fake=directory)
    done = in_private_mounts(f"{mount} && {sandboxfs(made)}")
    assert done.returncode == 125
    assert done.stderr.startswith("sandboxfs: linux.sysctl.net.ipv4.ip_forward: ")
    assert target.read_text() == "untouched"


def test_sysctls_of_the_user_namespace_are_not_set_on_the_host(bundle):
    with open("/proc/sys/user/max_time_namespaces", encoding="ascii") as file:
        before = file.read()

    def change(document):
        document["linux"]["namespaces"].append({"type": "user"})
        document["linux"]["sysctl"] = {"user.max_time_namespaces": "77"}

    done = run_cli("run", "--bundle", bundle(change), check=125)
    assert "would be set on the host" in done.stderr
    with open("/proc/sys/user/max_time_namespaces", encoding="ascii") as file:
        assert file.read() == before


# -- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("overlay", ["tmpfs", "none"])
def test_a_source_in_the_image_follows_the_images_links(bundle, secret, engine, overlay):
    """podman CVE-2024-1753: the image decides where its links lead, inside of it."""
    made = bundle()
    made.write(default_spec("/bin/cat", "/data/key"))
    (made.rootfs / "data").symlink_to(secret)
    (made.rootfs / secret.relative_to("/")).mkdir(parents=True)
    (made.rootfs / secret.relative_to("/") / "key").write_text("of the image\n")
    for source in (made.rootfs / "data", "rootfs/data", f"{made.rootfs}/data/../{secret.name}"):
        document = default_spec("/bin/cat", "/mnt/key")
        document["mounts"].append(bind_mount(source, "/mnt", "ro"))
        made.write(document)
        done = run_cli("run", "--bundle", made, "--engine", engine, "--overlay", overlay, check=0)
        assert done.stdout == "of the image\n"


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_other_runtimes_follow_them_on_the_host(bundle, secret, public_path, name):
    """The control."""
    from tests.support import needs

    needs(name)
    made = bundle()
    (made.rootfs / "data").symlink_to(secret)
    document = minimal_spec("/bin/cat", "/mnt/key")
    document["linux"]["namespaces"].append({"type": "pid"})
    document["mounts"] = [PROC, bind_mount(made.rootfs / "data", "/mnt", "ro")]
    made.write(document)
    done = in_private_mounts(other_runtime(name, public_path, made))
    assert done.stdout == "of the host\n", done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_tmpcopyup_copies_from_the_image_alone(bundle, secret, engine):
    """containerd CVE-2022-23648."""
    def change(document):
        document["mounts"].append(
            {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]})
        document["process"]["args"] = ["/bin/sh", "-c", f"ls /data; ls -A {secret}"]

    made = bundle(change)
    (made.rootfs / "data").symlink_to(f"../../../../../../..{secret}")
    done = run_cli("run", "--bundle", made, "--engine", engine, check=0)
    assert done.stdout == ""


def test_a_link_as_source_without_following_needs_no_slash_at_its_end(bundle, secret, public_path):
    link = public_path / "link"
    link.symlink_to(secret)

    def change(document):
        document["mounts"].append(bind_mount(f"{link}/", "/link", "copy-symlink"))
        document["process"]["args"] = ["/bin/readlink", "/link"]

    done = run_cli("run", "--bundle", bundle(change), check=0)
    assert done.stdout == f"{secret}\n"


def test_attaching_does_not_follow_a_last_symlink(bundle, public_path):
    import sandboxfs as library
    from tests.attacks.tools import planned
    from tests.support import in_namespace, points, table

    made = bundle(minimal_spec())
    (public_path / "real").mkdir()
    (public_path / "link").symlink_to("real")

    def attach():
        with library.build(planned(made)) as root:
            try:
                root.attach(f"{public_path}/link/")
            except library.MountError as error:
                return error.errno, points(table())
        return 0, points(table())

    number, mounts = in_namespace(attach)
    assert number
    assert not any(path.startswith(str(public_path)) for path in mounts)


# -- a link into procfs ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_link_of_the_image_leads_no_mount_into_procfs(bundle, secret, engine, kind):
    """The destination is a link to /proc/sys of the container's own procfs (CVE-2019-16884)."""
    over = {
        "tmpfs": {"destination": "/data/net", "type": "tmpfs", "source": "tmpfs"},
        "bind": bind_mount(secret, "/data/net"),
    }[kind]
    document = minimal_spec("/bin/sh", "-c", "ls /data/net; cat /data/net/key")
    document["mounts"] = [PROC, over]
    made = bundle(document)
    (made.rootfs / "data").symlink_to("/proc/sys")
    done = run_cli("run", "--bundle", made, "--engine", engine, check=125)
    assert "mounts[1]: mountpoint /data/net: ELOOP: " in done.stderr
    assert "leads into procfs" in done.stderr
    # Control: the same link to anywhere else is followed, as images expect.
    (made.rootfs / "data").unlink()
    (made.rootfs / "elsewhere").mkdir()
    (made.rootfs / "data").symlink_to("/elsewhere")
    done = run_cli("run", "--bundle", made, "--engine", engine)
    assert ("of the host" in done.stdout) is (kind == "bind")
