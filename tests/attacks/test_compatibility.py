"""What must go on working: images and volumes that are odd and harmless."""

import os

import pytest

from tests.attacks.tools import ENGINES, bind_mount
from tests.support import UNPRIVILEGED, default_spec, run_cli, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox")


def link(rootfs, path, target):
    place = rootfs / path
    if place.is_dir() and not place.is_symlink():
        place.rmdir()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("path", "target", "destination", "seen"), [
    ("var/run", "/run", "/var/run/secrets", "/run/secrets"),
    ("var/run", "../run", "/var/run/secrets/deep", "/run/secrets/deep"),
    ("var/lock", "../../../../run/lock", "/var/lock/sub", "/run/lock/sub"),
    ("etc/config", "../usr/etc", "/etc/config/new", "/usr/etc/new"),
    ("opt", "usr/missing/opt", "/opt/app", "/usr/missing/opt/app"),
    ("srv", "/var/srv/", "/srv", "/var/srv"),
    ("bin2", "bin", "/bin2/tools", "/bin/tools"),
])
def test_mountpoints_below_symlinks(bundle, public_path, engine, path, target, destination, seen):
    source = public_path / "source"
    source.mkdir()
    (source / "file").write_text("found\n")

    def change(document):
        document["mounts"].append(bind_mount(source, destination, "ro"))
        document["process"]["args"] = ["/bin/cat", f"{seen}/file", f"{destination}/file"]

    made = bundle(change)
    link(made.rootfs, path, target)
    with untouched(made.rootfs, source):
        done = run_cli("run", "--bundle", made, "--engine", engine, "--verify", check=0)
    assert done.stdout == "found\n" * 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("link_target", "destination"), [
    ("usr/lib/etc", "/etc/hostname"), ("/usr/lib/etc", "/etc/resolv.conf"),
])
def test_an_etc_that_is_a_link_takes_file_binds(
    bundle, public_path, engine, link_target, destination
):
    source = public_path / "file"
    source.write_text("content\n")

    def change(document):
        document["mounts"].append(bind_mount(source, destination))
        document["process"]["args"] = ["/bin/cat", destination]

    made = bundle(change)
    real = made.rootfs / "usr" / "lib" / "etc"
    real.parent.mkdir(parents=True)
    (made.rootfs / "etc").rename(real)
    (made.rootfs / "etc").symlink_to(link_target)
    done = run_cli("run", "--bundle", made, "--engine", engine, check=0)
    assert done.stdout == "content\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dangling_link_as_mountpoint_has_its_target_made(bundle, public_path, engine):
    source = public_path / "file"
    source.write_text("content\n")

    def change(document):
        document["mounts"].append(bind_mount(source, "/etc/resolv.conf"))
        document["process"]["args"] = ["/bin/cat", "/run/resolved/stub.conf"]

    made = bundle(change)
    link(made.rootfs, "etc/resolv.conf", "../run/resolved/stub.conf")
    done = run_cli("run", "--bundle", made, "--engine", engine, check=0)
    assert done.stdout == "content\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mounted_dev_may_be_reached_by_a_link(bundle, engine):
    """/dev of the image leads to another directory, and a tmpfs is mounted there."""
    def change(document):
        document["linux"]["devices"] = [
            {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
            {"path": "/dev//fuse", "type": "c", "major": 10, "minor": 229},
        ]
        document["process"]["args"] = [
            "/bin/sh", "-c",
            ("test -c /dev/null && test -c /devices/net/tun && test -c /dev/fuse"
             " && test -L /devices/stdin && echo x > /dev/null"),
        ]

    made = bundle(change)
    (made.rootfs / "devices").mkdir()
    link(made.rootfs, "dev", "devices")
    run_cli("run", "--bundle", made, "--engine", engine, check=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dev_of_the_images_own_needs_no_mount(bundle, engine):
    def change(document):
        document["mounts"] = [
            mount for mount in document["mounts"] if not mount["destination"].startswith("/dev")]
        document["process"]["args"] = [
            "/bin/sh", "-c", "echo x > /dev/null && test -c /dev/zero && test -L /dev/fd"]

    made = bundle(change)
    os.mknod(made.rootfs / "dev" / "null", 0o20600, os.makedev(1, 3))
    with untouched(made.rootfs):
        run_cli("run", "--bundle", made, "--engine", engine, check=0)


@pytest.mark.parametrize("mode", [0o711, 0o700, 0o751])
def test_closed_directories_on_the_way_to_root_and_sources(public_path, bundle, mode):
    """The caller may walk through them, and that is enough."""
    made = bundle(default_spec("/bin/cat", "/inside/file"))
    closed = public_path / "closed"
    (closed / "open").mkdir(parents=True)
    (closed / "open" / "file").write_text("found\n")
    made.document["mounts"].append(bind_mount(closed / "open", "/inside", "ro"))
    made.write(made.document)
    closed.chmod(mode)
    (made.rootfs / "root").chmod(mode)
    run_cli("run", "--bundle", made, check=0)


@pytest.mark.needs("user-namespaces")
def test_a_directory_that_can_only_be_walked_through(public_path):
    """0711 above the rootfs and the sources, as an unprivileged user (bwrap CVE-2026-87766)."""
    from tests.support import make_bundle

    walk = public_path / "walk"
    walk.mkdir()
    source = walk / "source"
    source.mkdir()
    (source / "file").write_text("found\n")
    document = default_spec("/bin/cat", "/run/inside/file")
    document["linux"]["namespaces"].append({"type": "user"})
    document["mounts"] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        bind_mount(source, "/run/inside", "ro"),
    ]
    made = make_bundle(walk, document)
    walk.chmod(0o711)
    (made.rootfs / "root").chmod(0o700)
    done = run_cli("run", "--bundle", made, uid=UNPRIVILEGED, check=0)
    assert done.stdout == "found\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_links_of_applets_and_merged_usr(bundle, engine):
    made = bundle(default_spec("/bin/sh", "-c", "ls -l /bin/true && exec true"))
    (made.rootfs / "usr").mkdir()
    (made.rootfs / "bin").rename(made.rootfs / "usr" / "bin")
    for name in ("bin", "sbin"):
        (made.rootfs / name).symlink_to("usr/bin")
    run_cli("run", "--bundle", made, "--engine", engine, check=0)


@pytest.mark.parametrize("cwd", ["/run/../tmp", "/var/run/work", "/made/for/this"])
def test_working_directories_through_links(bundle, cwd):
    def change(document):
        document["process"]["cwd"] = cwd
        document["process"]["args"] = ["/bin/pwd"]

    made = bundle(change)
    link(made.rootfs, "var/run", "/run")
    done = run_cli("run", "--bundle", made, check=0)
    assert done.stdout.strip() in ("/tmp", "/run/work", "/made/for/this")


def test_a_procfs_can_be_bound_from_the_host(bundle):
    def change(document):
        document["linux"]["namespaces"] = [
            entry for entry in document["linux"]["namespaces"] if entry["type"] != "pid"]
        document["mounts"][0] = bind_mount("/proc", "/proc", "rbind")
        document["process"]["args"] = ["/bin/cat", "/proc/self/status"]

    run_cli("run", "--bundle", bundle(change), check=0)


def test_what_lxcfs_binds_over_procfs(bundle, public_path):
    source = public_path / "uptime"
    source.write_text("1.00 1.00\n")

    def change(document):
        document["mounts"].append(bind_mount(source, "/proc/uptime", "ro"))
        document["process"]["args"] = ["/bin/cat", "/proc/uptime"]

    done = run_cli("run", "--bundle", bundle(change), check=0)
    assert done.stdout == "1.00 1.00\n"
