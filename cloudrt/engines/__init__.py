"""One module for each way to run an artifact; `cloudrt.engines.choice` picks one."""
