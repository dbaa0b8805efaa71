"""What training costs: utilisation, days, dollars, energy. Every quantity has its unit in its name or
docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

from ... import InputError

HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class TrainingCost:
    """A run of so many tokens at a steady rate.

    tokens, chips   numbers;  tokens_per_second: of all chips together
    price           US dollars a chip-hour, None where not known
    power           watts a chip; a data sheet's (`Chip.power`) leaves out the host and the cooling
    """

    tokens: float
    chips: int
    tokens_per_second: float
    price: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "chips", "tokens_per_second"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def days(self) -> float:
        """Days of wall clock."""
        return self.tokens / self.tokens_per_second / DAY

    @property
    def chip_hours(self) -> float:
        """Hours of one chip."""
        return self.days * DAY / HOUR * self.chips

    @property
    def dollars(self) -> float | None:
        """US dollars, None without a price."""
        return None if self.price is None else self.chip_hours * self.price

    @property
    def kilowatt_hours(self) -> float | None:
        """Energy of the chips, None without a power."""
        return None if self.power is None else self.chip_hours * self.power / 1000


def utilisation(flops_per_token: float, tokens_per_second: float, chips: int, peak: float) -> float:
    """Model FLOPs utilisation: useful operations a second over the peak of all chips."""
    return flops_per_token * tokens_per_second / (chips * peak)


def tokens_per_second(flops_per_token: float, utilised: float, chips: int, peak: float) -> float:
    """The rate at which chips train at a utilisation."""
    return utilised * chips * peak / flops_per_token


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D: forward and backward of N parameters over D tokens, attention's own products left out."""
    return 6.0 * parameters * tokens


def training_days(parameters: float, tokens: float, chips: int, peak: float, utilised: float) -> float:
    """Days of 6 N D operations at a utilisation."""
    return training_flops(parameters, tokens) / (chips * peak * utilised) / DAY
