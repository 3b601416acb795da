"""The seven stages, one module each: functions of files to files."""
