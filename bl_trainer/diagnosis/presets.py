"""The presets of a sweep: which runs each makes. Diagnosis writes them and the sweep runs them."""

# Of `short`: length of its runs as a share of the recipe's, and how many objectives go on after the first stage
SHARE, FINALISTS = 0.25, 2

# The first seed of `short` chooses, the others judge: the runs that chose the best are the lucky ones among equals
SEEDS: dict[str, tuple[int, ...]] = {"short": (0, 1, 2, 3), "full": (0, 1, 2)}

RATE_FACTORS = (1 / 3, 1, 3)  # learning rates that are swept, as multiples of the recipe's


def count_runs(preset: str, settings: int, objectives: int, seeds: int) -> int:
    """Return the number of runs of a preset.

    `full`: settings * seeds. `short`: settings + min(FINALISTS, objectives) * (seeds - 1).
    """
    if preset == "full":
        return settings * seeds
    return settings + min(FINALISTS, objectives) * (seeds - 1)


def cost_text(objectives: int, rates: int) -> str:
    """Return what each preset costs, in trainings of the recipe, evaluations apart."""
    runs = {preset: count_runs(preset, objectives * rates, objectives, len(seeds)) for preset, seeds in SEEDS.items()}
    return (
        f"preset short: {runs['short']} runs of {SHARE:.0%} of the recipe's length, the cost of {runs['short'] * SHARE:g} "
        f"trainings; preset full: {runs['full']} trainings"
    )
