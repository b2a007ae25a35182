"""Run one seed of the simulation and say what happens: PYTHONPATH=tests python -m sim SEED."""

from __future__ import annotations

import sys

from sim.simulation import Simulation

if __name__ == "__main__":
    print(Simulation(int(sys.argv[1]), log=print).run())
