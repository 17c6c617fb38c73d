// The first program of the emulated machine: runs smoke with each instruction set of SMOKE_SETS, a variable that the
// kernel's command line sets, and turns the machine off.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(void) {
    char* sets = getenv("SMOKE_SETS");
    for (char* isa = strtok(sets, ","); isa != NULL; isa = strtok(NULL, ",")) {
        const pid_t child = fork();
        int status = 0;
        if (child == 0) {
            setenv("DEPTHLSTM_CPU_ISA", isa, 1);
            execl("/smoke", "smoke", "reuse", (char*)NULL);
            _exit(127);
        }
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) printf("%s ended by signal %d\n", isa, WTERMSIG(status));
        if (WIFEXITED(status)) printf("%s ended with status %d\n", isa, WEXITSTATUS(status));
        fflush(stdout);
    }
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
}
