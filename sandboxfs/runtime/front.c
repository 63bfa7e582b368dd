/*
 * The program that stands in front of an OCI runtime.
 *
 * An engine calls its runtime many times for one container: create, start, state, kill, delete.
 * Only create, run and restore make a container, so only these need Python, which takes ten
 * milliseconds to start.  For everything else this program executes the runtime at once, with the
 * caller's own words, environment and descriptors.
 *
 * It decides nothing else.  Where it can't tell for certain that the command is another one, it
 * starts `sandboxfs.runtime.main`, which reads the command line as the runtime does.
 *
 * It is linked statically and reads no file.  `sandboxfs runtime wrap` writes its settings into a
 * copy of it (wrap.py).
 */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FAILED = 125 };

/*
 * The settings, each ended by NUL: the runtime's path, the interpreter's path, the code for its
 * -c, the kind of runtime, and the operator's file or nothing.  Volatile: the compiler has to read
 * them from the file, and wrap.py finds them by the first line.
 */
static volatile char settings[20480] = "sandboxfs front, settings:\n";
#define START (sizeof "sandboxfs front, settings:\n" - 1)

enum setting { RUNTIME, INTERPRETER, CODE, KIND, CONFIG, SETTINGS };

/* Options that stand before the command and take the next word as their value (runc, crun, youki). */
static const char *const with_value[] = {
	"root", "log", "log-format", "log-level", "rootless", "cgroup-manager", "criu", NULL,
};
static const char *const without_value[] = { "debug", "systemd-cgroup", NULL };
/* With these a runtime prints something and makes no container. */
static const char *const questions[] = { "--help", "-h", "--version", "-v", NULL };
static const char *const makers[] = { "create", "run", "restore", NULL };

static int is_one_of(const char *word, size_t length, const char *const *words)
{
	for (; *words; words++)
		if (strlen(*words) == length && !memcmp(word, *words, length))
			return 1;
	return 0;
}

/* A later runc drops white space around a word before it looks at it. */
static int is_maker(const char *word)
{
	static const char space[] = " \t\n\v\f\r";
	const char *at;
	size_t length;

	/* Unicode has more of it, which Python knows. */
	for (at = word; *at; at++)
		if ((unsigned char)*at >= 128)
			return 1;
	word += strspn(word, space);
	length = strcspn(word, space);
	return is_one_of(word, length, makers);
}

/* Return whether the command line may make a container; *log is the value of --log, if any. */
static int may_make_one(char **argv, const char **log)
{
	int at;

	for (at = 1; argv[at]; at++) {
		const char *word = argv[at], *name, *equals;
		size_t length;

		if (word[0] != '-')
			return is_maker(word);
		if (is_one_of(word, strlen(word), questions))
			return 0;
		if (!strcmp(word, "--"))
			return argv[at + 1] && is_maker(argv[at + 1]);
		if (word[1] != '-')
			break;
		name = word + 2;
		equals = strchr(name, '=');
		length = equals ? (size_t)(equals - name) : strlen(name);
		if (is_one_of(name, length, with_value)) {
			const char *value = equals ? equals + 1 : argv[at + 1];

			if (!value)
				return 0; /* the runtime says that it is missing */
			if (!equals && is_maker(value))
				break; /* not every runtime has a value there */
			if (length == 3 && !memcmp(name, "log", 3))
				*log = value;
			at += !equals;
		} else if (equals || !is_one_of(name, length, without_value)) {
			break;
		}
	}
	/* An option that isn't known here: any later word may be the command. */
	for (; argv[at]; at++)
		if (is_maker(argv[at]))
			return 1;
	return 0;
}

/* Engines show a failure from the file of --log alone, as a line of JSON. */
static void tell(const char *log, const char *path, int error)
{
	char text[8192];
	int fd, length;

	dprintf(2, "sandboxfs: runtime: execve %s: %s\n", path, strerror(error));
	if (!log || log[0] != '/' || strpbrk(path, "\"\\\n"))
		return;
	fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);
	if (fd < 0)
		return;
	length = snprintf(text, sizeof text, "{\"level\":\"error\",\"msg\":\"sandboxfs: runtime: "
			  "execve %s: %s\"}\n", path, strerror(error));
	if (length > 0 && length < (int)sizeof text && write(fd, text, length) != length)
		dprintf(2, "sandboxfs: runtime: write %s: failed\n", log);
}

static char is_ignored(int number)
{
	struct sigaction action;

	return !sigaction(number, NULL, &action) && action.sa_handler == SIG_IGN ? '1' : '0';
}

/*
 * Python must not follow the caller's environment, and the runtime has to get all of it as it is:
 * each entry is marked by a byte in front, so that no library knows its name.
 */
static char **marked(char **environment)
{
	size_t count = 0, size = 0, at;
	char **copy, *text;

	for (; environment[count]; count++)
		size += strlen(environment[count]) + 2;
	/* Of Python's own it needs one: without it, it looks for a locale that has UTF-8. */
	copy = malloc((count + 2) * sizeof *copy);
	text = malloc(size + 1);
	if (!copy || !text)
		return NULL;
	for (at = 0; at < count; at++) {
		copy[at] = text;
		*text++ = 1;
		text = stpcpy(text, environment[at]) + 1;
	}
	copy[count++] = "LC_ALL=C";
	copy[count] = NULL;
	return copy;
}

int main(int argc, char **argv, char **environment)
{
	const char *value[SETTINGS], *log = NULL;
	char *at = (char *)settings + START, signals[3], **words, **copy;
	int which;

	for (which = 0; which < SETTINGS; which++) {
		value[which] = at;
		at += strlen(at) + 1;
	}
	if (!*value[RUNTIME] || argc < 1) {
		dprintf(2, "sandboxfs: runtime: no settings: `sandboxfs runtime wrap` writes this program\n");
		return FAILED;
	}
	if (!may_make_one(argv, &log)) {
		argv[0] = (char *)value[RUNTIME];
		execv(value[RUNTIME], argv);
		tell(log, value[RUNTIME], errno);
		return FAILED;
	}
	words = malloc((argc + 9) * sizeof *words);
	copy = marked(environment);
	if (!words || !copy) {
		tell(log, value[INTERPRETER], ENOMEM);
		return FAILED;
	}
	/* Python ignores both, whatever they were. */
	signals[0] = is_ignored(SIGPIPE);
	signals[1] = is_ignored(SIGXFSZ);
	signals[2] = 0;
	words[0] = (char *)value[INTERPRETER];
	words[1] = "-ISBc";
	words[2] = (char *)value[CODE];
	words[3] = (char *)value[RUNTIME];
	words[4] = (char *)value[KIND];
	words[5] = (char *)value[CONFIG];
	words[6] = signals;
	memcpy(words + 7, argv + 1, argc * sizeof *words);
	execve(value[INTERPRETER], words, copy);
	tell(log, value[INTERPRETER], errno);
	return FAILED;
}
