"""How a rank stays alive and how it ends: stop requests, walltime, watchdog, heartbeat, exit reports."""
