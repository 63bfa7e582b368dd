/* Try to loosen and to remove every mount of this mount namespace, from inside.
 *
 * One line an attempt: what was tried, the mountpoint, and the errno's name or OK. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>

#define MOST 512

static const struct {
	const char *name;
	unsigned long flag;
} words[] = {
	{"ro", MS_RDONLY}, {"nosuid", MS_NOSUID}, {"nodev", MS_NODEV}, {"noexec", MS_NOEXEC},
};

static char points[MOST][512];
static unsigned long flags[MOST];

static void tell(const char *what, const char *point, int result)
{
	printf("%s %s %s\n", what, point, result == 0 ? "OK" : strerrorname_np(errno));
}

int main(void)
{
	char line[4096], options[512];
	int count = 0;
	FILE *table = fopen("/proc/self/mountinfo", "r");

	while (table && count < MOST && fgets(line, sizeof line, table)) {
		if (sscanf(line, "%*d %*d %*s %*s %511s %511s", points[count], options) != 2)
			return 2;
		for (char *word = strtok(options, ","); word; word = strtok(NULL, ","))
			for (size_t at = 0; at < sizeof words / sizeof *words; at++)
				if (!strcmp(word, words[at].name))
					flags[count] |= words[at].flag;
		count++;
	}
	for (int each = count - 1; each >= 0; each--) {
		for (size_t at = 0; at < sizeof words / sizeof *words; at++) {
			if (!(flags[each] & words[at].flag))
				continue;
			unsigned long kept = flags[each] & ~words[at].flag;
			tell(words[at].name, points[each],
			     mount(NULL, points[each], NULL, MS_REMOUNT | MS_BIND | kept, NULL));
			/* What came off goes on again: the next attempt is one flag, too. */
			mount(NULL, points[each], NULL, MS_REMOUNT | MS_BIND | flags[each], NULL);
		}
	}
	for (int each = count - 1; each >= 0; each--)
		tell("umount", points[each], umount2(points[each], MNT_DETACH));
	return 0;
}
