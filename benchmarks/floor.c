/* The floor: the build of the bench's bundle by hand, in the fewest system calls.
 *
 * What `sandboxfs` does for the spec in benchmarks/bundle.py, with everything known ahead: a
 * read-only clone of the rootfs and a tmpfs joined by overlayfs, the spec's mounts in order,
 * six devices and the links of /dev, /tmp, masked and read-only paths.  Paths in the rootfs are
 * resolved by openat2 within the root, as anything has to that doesn't trust an image; nothing
 * else is looked at twice, nothing but the build's own errors is checked, and descriptors are
 * left open until the clock has stopped.
 *
 *   floor ROOTFS        reads commands from stdin, one byte each, answers with a line each:
 *     b   build a detached tree here            its nanoseconds
 *     f   fork; in the child unshare the mount namespace, build, attach, pivot, exit; wait
 *                                               the nanoseconds from before the fork to the end
 *     m   like f, but the answer is the child's mountinfo and /dev, ended by a line "."
 *   With FLOOR_BINDS=SOURCE and FLOOR_COUNT=N in the environment: N binds more, on /data.
 *   floor ROOTFS HIERARCHY… mounts cgroups too: a controller, name=NAME, or "" for cgroup2
 *
 * The caller has unshared all namespaces that the mounts need.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Not from sys/mount.h: it and linux/mount.h exclude each other in older libcs. */
int umount2(const char *, int);
#define MNT_DETACH 2

#define NOSUID MOUNT_ATTR_NOSUID
#define NODEV MOUNT_ATTR_NODEV
#define NOEXEC MOUNT_ATTR_NOEXEC
#define RDONLY MOUNT_ATTR_RDONLY
#define STRICTATIME MOUNT_ATTR_STRICTATIME

static const char *rootfs;
static char **hierarchies;

static int must(long result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
		_exit(1);
	}
	return (int)result;
}

static void text(int fd, const char *key, const char *value)
{
	must(syscall(SYS_fsconfig, fd, FSCONFIG_SET_STRING, key, value, 0), key);
}

static int context(const char *type, const char *source)
{
	int fd = must(syscall(SYS_fsopen, type, FSOPEN_CLOEXEC), type);
	if (source)
		text(fd, "source", source);
	return fd;
}

static void flag(int fd, const char *key)
{
	must(syscall(SYS_fsconfig, fd, FSCONFIG_SET_FLAG, key, NULL, 0), key);
}

static void descriptor(int fd, const char *key, int value)
{
	must(syscall(SYS_fsconfig, fd, FSCONFIG_SET_FD, key, NULL, value), key);
}

static int mounted(int fd, unsigned attributes)
{
	must(syscall(SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, NULL, NULL, 0), "create");
	return must(syscall(SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes), "fsmount");
}

static int in_root(int root, const char *path, uint64_t flags)
{
	struct open_how how = {
		.flags = O_PATH | O_CLOEXEC | flags,
		.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
	};
	return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static int directory(int root, const char *path)
{
	int fd = in_root(root, path, O_DIRECTORY);
	if (fd < 0 && errno == ENOENT) {
		must(mkdirat(root, path + 1, 0755), path);
		fd = in_root(root, path, O_DIRECTORY);
	}
	return must(fd, path);
}

/* A directory of a file system that was made a moment ago. */
static int made(int parent, const char *name)
{
	must(mkdirat(parent, name, 0755), name);
	return must(openat(parent, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), name);
}

static void attach(int mount, int point)
{
	must(syscall(SYS_move_mount, mount, "", point, "",
		     MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH), "move_mount");
}

static void set(int mount, unsigned attributes)
{
	struct mount_attr attr = { .attr_set = attributes };
	must(syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH, &attr, sizeof attr), "mount_setattr");
}

static int cloned(int fd, const char *path)
{
	return must(syscall(SYS_open_tree, fd, path,
			    OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (*path ? 0 : AT_EMPTY_PATH)),
		    "open_tree");
}

static int overlay(void)
{
	struct stat status;
	int lower = cloned(AT_FDCWD, rootfs);
	set(lower, RDONLY);
	int upper = mounted(context("tmpfs", NULL), 0);
	int up = made(upper, "upper");
	int work = made(upper, "work");
	must(fstat(lower, &status), "fstat");
	must(fchownat(up, "", status.st_uid, status.st_gid, AT_EMPTY_PATH), "fchownat");
	must(fchmodat(upper, "upper", status.st_mode & 07777, 0), "fchmodat");
	int fs = context("overlay", "overlay");
	descriptor(fs, "lowerdir+", lower);
	descriptor(fs, "upperdir", up);
	descriptor(fs, "workdir", work);
	text(fs, "redirect_dir", "nofollow");
	text(fs, "metacopy", "off");
	return mounted(fs, 0);
}

static int tmpfs(const char *source, const char *mode, const char *size, unsigned attributes)
{
	int fs = context("tmpfs", source);
	text(fs, "mode", mode);
	if (size)
		text(fs, "size", size);
	return mounted(fs, attributes);
}

static int dev(int root)
{
	int point = directory(root, "/dev");
	int mount = tmpfs("tmpfs", "755", "65536k", NOSUID | STRICTATIME);
	attach(mount, point);
	int fs = context("devpts", "devpts");
	flag(fs, "newinstance");
	text(fs, "ptmxmode", "0666");
	text(fs, "mode", "0620");
	text(fs, "gid", "5");
	point = made(mount, "pts");
	attach(mounted(fs, NOSUID | NOEXEC), point);
	point = made(mount, "shm");
	attach(tmpfs("shm", "1777", "65536k", NOSUID | NOEXEC | NODEV), point);
	point = made(mount, "mqueue");
	attach(mounted(context("mqueue", "mqueue"), NOSUID | NOEXEC | NODEV), point);
	return mount;
}

/* One mount a hierarchy below a tmpfs, as hybrid hosts have it; cgroup2 alone elsewhere. */
static void cgroup(int root)
{
	const unsigned attributes = NOSUID | NODEV | NOEXEC | RDONLY;
	int point = must(in_root(root, "/sys/fs/cgroup", O_DIRECTORY), "/sys/fs/cgroup");
	if (!hierarchies[1] && !*hierarchies[0]) {
		attach(mounted(context("cgroup2", "cgroup"), attributes), point);
		return;
	}
	int top = tmpfs("cgroup", "755", NULL, attributes & ~RDONLY);
	for (char **name = hierarchies; *name; name++) {
		int named = strncmp(*name, "name=", 5) == 0;
		int fs = context(**name ? "cgroup" : "cgroup2", "cgroup");
		if (named) {
			flag(fs, "none");
			text(fs, "name", *name + 5);
		} else if (**name) {
			flag(fs, *name);
		}
		int mount = mounted(fs, attributes);
		attach(mount, made(top, named ? *name + 5 : **name ? *name : "unified"));
	}
	set(top, RDONLY);
	attach(top, point);
}

static void devices(int dev)
{
	static const struct { const char *name; int major, minor; } nodes[] = {
		{ "null", 1, 3 }, { "zero", 1, 5 }, { "full", 1, 7 },
		{ "random", 1, 8 }, { "urandom", 1, 9 }, { "tty", 5, 0 },
	};
	for (unsigned i = 0; i < sizeof nodes / sizeof *nodes; i++)
		must(mknodat(dev, nodes[i].name, S_IFCHR | 0666,
			     makedev(nodes[i].major, nodes[i].minor)), nodes[i].name);
	must(symlinkat("/proc/self/fd", dev, "fd"), "fd");
	must(symlinkat("/proc/self/fd/0", dev, "stdin"), "stdin");
	must(symlinkat("/proc/self/fd/1", dev, "stdout"), "stdout");
	must(symlinkat("/proc/self/fd/2", dev, "stderr"), "stderr");
	if (access("/proc/kcore", F_OK) == 0)
		must(symlinkat("/proc/kcore", dev, "core"), "core");
	must(symlinkat("pts/ptmx", dev, "ptmx"), "ptmx");
}

/* /tmp gets a tmpfs where nothing would be hidden. */
static void tmp(int root)
{
	char entries[1024];
	struct open_how how = {
		.flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC,
		.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
	};
	int fd = must(syscall(SYS_openat2, root, "/tmp", &how, sizeof how), "/tmp");
	long length = must(syscall(SYS_getdents64, fd, entries, sizeof entries), "getdents64");
	/* "." and "..": 24 bytes each; a tree of mounts that we made has none in it. */
	if (length <= 48)
		attach(tmpfs("tmpfs", "1777", NULL, NOSUID | NODEV), fd);
}

static void masks(int root)
{
	static const char *const paths[] = {
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
		"/proc/scsi",
	};
	struct stat status;
	int empty = -1, null = -1;
	for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++) {
		int fd = in_root(root, paths[i], O_NOFOLLOW), mount;
		if (fd < 0)
			continue;
		must(fstat(fd, &status), "fstat");
		if (S_ISDIR(status.st_mode)) {
			if (empty < 0) {
				int fs = context("tmpfs", NULL);
				text(fs, "nr_inodes", "1");
				text(fs, "nr_blocks", "1");
				flag(fs, "ro");
				mount = empty = mounted(fs, RDONLY | NOSUID | NODEV | NOEXEC);
			} else {
				mount = cloned(empty, "");
			}
		} else {
			if (null < 0)
				set(mount = null = cloned(AT_FDCWD, "/dev/null"), RDONLY | NOSUID | NOEXEC);
			else
				mount = cloned(null, "");
		}
		attach(mount, fd);
	}
}

static void readonly_paths(int root)
{
	static const char *const paths[] = {
		"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
	};
	for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++) {
		int fd = in_root(root, paths[i], O_NOFOLLOW);
		if (fd < 0)
			continue;
		int mount = cloned(fd, "");
		set(mount, RDONLY);
		attach(mount, fd);
	}
}

/* The binds of bundle.binds(): SOURCE/N on /data/N, nosuid and private. */
static void binds(int root)
{
	const char *source = getenv("FLOOR_BINDS");
	int count = source ? atoi(getenv("FLOOR_COUNT")) : 0;
	char from[4096], to[64];
	if (count)
		directory(root, "/data");
	for (int number = 0; number < count; number++) {
		struct mount_attr attr = { .attr_set = NOSUID, .propagation = MS_PRIVATE };
		snprintf(from, sizeof from, "%s/%d", source, number);
		snprintf(to, sizeof to, "/data/%d", number);
		int mount = must(syscall(SYS_open_tree, AT_FDCWD, from, OPEN_TREE_CLONE |
					 OPEN_TREE_CLOEXEC | AT_RECURSIVE), "open_tree");
		must(syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH, &attr, sizeof attr),
		     "mount_setattr");
		attach(mount, directory(root, to));
	}
}

static int build(void)
{
	int root = overlay();
	int point = directory(root, "/proc");
	attach(mounted(context("proc", "proc"), NOSUID | NOEXEC | NODEV), point);
	int made_dev = dev(root);
	point = directory(root, "/sys");
	attach(mounted(context("sysfs", "sysfs"), NOSUID | NOEXEC | NODEV | RDONLY), point);
	if (*hierarchies)
		cgroup(root);
	point = directory(root, "/run");
	attach(tmpfs("tmpfs", "755", "65536k", NOSUID | STRICTATIME), point);
	binds(root);
	devices(made_dev);
	tmp(root);
	masks(root);
	readonly_paths(root);
	return root;
}

static void enter(void)
{
	struct mount_attr attr = { .propagation = MS_SLAVE };
	must(unshare(CLONE_NEWNS), "unshare");
	must(syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &attr, sizeof attr), "slave");
	int root = build();
	must(syscall(SYS_move_mount, root, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH), "attach");
	must(fchdir(root), "fchdir");
	must(syscall(SYS_pivot_root, ".", "."), "pivot_root");
	must(umount2(".", MNT_DETACH), "umount2");
	must(chdir("/"), "chdir");
}

static int64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void copy_out(const char *path)
{
	char piece[4096];
	ssize_t length;
	int fd = must(open(path, O_RDONLY), path);
	while ((length = read(fd, piece, sizeof piece)) > 0)
		must(write(1, piece, length), "write");
}

static void show(void)
{
	struct dirent *entry;
	struct stat status;
	copy_out("/proc/thread-self/mountinfo");
	DIR *listing = opendir("/dev");
	while ((entry = readdir(listing))) {
		must(fstatat(dirfd(listing), entry->d_name, &status, AT_SYMLINK_NOFOLLOW), "fstatat");
		dprintf(1, "dev %s %o %u:%u\n", entry->d_name, status.st_mode,
			major(status.st_rdev), minor(status.st_rdev));
	}
}

static void forked(int shown)
{
	int status;
	int64_t start = now();
	pid_t child = must(fork(), "fork");
	if (child == 0) {
		enter();
		if (shown)
			show();
		_exit(0);
	}
	must(waitpid(child, &status, 0), "waitpid");
	if (status)
		_exit(1);
	if (shown)
		dprintf(1, ".\n");
	else
		dprintf(1, "%lld\n", (long long)(now() - start));
}

static void detached(void)
{
	int first = must(open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null");
	int64_t start = now();
	build();
	dprintf(1, "%lld\n", (long long)(now() - start));
	close_range(first, ~0U, 0);
}

int main(int argc, char **argv)
{
	char command;
	if (argc < 2)
		return 2;
	rootfs = argv[1];
	hierarchies = argv + 2;
	umask(0);
	while (read(0, &command, 1) == 1) {
		if (command == 'b')
			detached();
		else if (command == 'f' || command == 'm')
			forked(command == 'm');
	}
	return 0;
}
