"""Where the time of one frame goes, what would help, and how many video streams a device can take."""
