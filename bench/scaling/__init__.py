"""The scaling policies over a model of a fleet, in virtual time: SLO attainment against worker-hours."""
