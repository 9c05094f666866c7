"""The .jxc file: save, load and inspect trees with compressed leaves."""
