/*
 * A program in a runtime's place that tells how it was started: each fact on a line of its own,
 * `name value`, bytes that can't be printed as \xNN.  `--version` is answered as a runtime does.
 */

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static void tell(const char *name, const char *value)
{
	printf("%s ", name);
	for (; *value; value++) {
		unsigned char byte = (unsigned char)*value;

		if (byte < 32 || byte > 126 || byte == '\\')
			printf("\\x%02x", byte);
		else
			putchar(byte);
	}
	putchar('\n');
}

int main(int argc, char **argv, char **environment)
{
	const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	char path[4096], number[64];
	struct rlimit limit;
	struct dirent *entry;
	DIR *descriptors;
	int at;

	if (argc == 2 && !strcmp(argv[1], "--version")) {
		printf("%s version 1.0\n", name);
		return 0;
	}
	for (at = 0; at < argc; at++)
		tell("argument", argv[at]);
	for (at = 0; environment[at]; at++)
		tell("environment", environment[at]);
	for (at = 1; at < NSIG; at++) {
		struct sigaction action;

		if (!sigaction(at, NULL, &action) && action.sa_handler == SIG_IGN) {
			snprintf(number, sizeof number, "%d", at);
			tell("ignored", number);
		}
	}
	snprintf(number, sizeof number, "%04o", umask(0));
	tell("umask", number);
	if (getcwd(path, sizeof path))
		tell("directory", path);
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		snprintf(number, sizeof number, "%ld", (long)limit.rlim_cur);
		tell("limit", number);
	}
	descriptors = opendir("/proc/self/fd");
	while (descriptors && (entry = readdir(descriptors))) {
		if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(descriptors))
			tell("descriptor", entry->d_name);
	}
	return 37;
}
