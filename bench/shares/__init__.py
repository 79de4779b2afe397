"""The parts of bench/fairness.py: guests and what they do, the regimes they are put under, what is measured."""
