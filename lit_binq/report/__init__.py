"""`litbinq report`: figures and one page about runs."""
