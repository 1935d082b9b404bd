"""Many devices and hosts as one."""
