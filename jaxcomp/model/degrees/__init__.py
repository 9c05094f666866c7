"""By which power of a channel's scale every array of a program moves."""
