"""Step times of autopart's plans beside other systems and hand-written code, on the ranks of this machine."""
