"""How `edge-agent` ends. The systemd unit restarts it after everything but a clean end and a configuration error."""

OK = 0
CRASH = 1  # restarted
USAGE = 2  # what the command line parser uses
CONFIG_ERROR = 78  # EX_CONFIG of sysexits.h: a restart cannot help until somebody changes the settings
TRY_AGAIN = 75  # EX_TEMPFAIL: nobody answered, or a person must approve first
