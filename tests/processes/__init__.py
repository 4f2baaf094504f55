"""A whole Baton of real processes: started by `baton serve`, asked over HTTP, hurt by real signals."""
