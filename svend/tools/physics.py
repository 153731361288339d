"""Conversion of units, and physical constants, both by the library pint (CODATA 2022)."""

from __future__ import annotations

import difflib
import functools
import math
import re
from typing import TYPE_CHECKING

from svend.tools.formatting import format_number
from svend.tools.tool import ToolError, define_tool, quote

if TYPE_CHECKING:
    from pint import UnitRegistry

MAX_UNIT_CHARACTERS = 60
MAX_DEPTH = 2
# A unit: names, perhaps with a small exponent, between operators. What pint works out for a power
# grows with it, so that of parentheses has one digit, and there are no powers of powers.
EXPONENT = r"\s*(\*\*|\^)\s*[-+]?\d{1,2}(\.\d)?(?![\d.])"
GROUP_EXPONENT = r"\s*(\*\*|\^)\s*[-+]?\d(?![\d.])"
UNIT_TOKEN = re.compile(
    rf"\s*(?:(?P<name>[^\W\d]\w*|[%°]\w*)({EXPONENT})?|1(?=\s*/)|(?P<open>\()"
    rf"|(?P<close>\))({GROUP_EXPONENT})?|[*/](?![*/])|(?P<end>$))"
)
# Common name: what pint calls it, and the unit to state it in.
CONSTANTS = {
    "speed of light": ("speed_of_light", "m/s"),
    "planck constant": ("planck_constant", "J*s"),
    "reduced planck constant": ("dirac_constant", "J*s"),
    "elementary charge": ("elementary_charge", "C"),
    "avogadro constant": ("avogadro_constant", "1/mol"),
    "boltzmann constant": ("boltzmann_constant", "J/K"),
    "gas constant": ("molar_gas_constant", "J/(mol*K)"),
    "faraday constant": ("faraday_constant", "C/mol"),
    "gravitational constant": ("newtonian_constant_of_gravitation", "m^3/(kg*s^2)"),
    "standard gravity": ("standard_gravity", "m/s^2"),
    "standard atmosphere": ("standard_atmosphere", "Pa"),
    "stefan-boltzmann constant": ("stefan_boltzmann_constant", "W/(m^2*K^4)"),
    "wien displacement constant": ("wien_wavelength_displacement_law_constant", "m*K"),
    "electron mass": ("electron_mass", "kg"),
    "proton mass": ("proton_mass", "kg"),
    "neutron mass": ("neutron_mass", "kg"),
    "atomic mass constant": ("atomic_mass_constant", "kg"),
    "rydberg constant": ("rydberg_constant", "1/m"),
    "fine-structure constant": ("fine_structure_constant", ""),
    "vacuum permittivity": ("vacuum_permittivity", "F/m"),
    "vacuum permeability": ("vacuum_permeability", "N/A^2"),
    "coulomb constant": ("coulomb_constant", "N*m^2/C^2"),
    "magnetic flux quantum": ("magnetic_flux_quantum", "Wb"),
}
SYMBOLS = {
    "c": "speed of light", "h": "planck constant", "hbar": "reduced planck constant",
    "N_A": "avogadro constant", "k_B": "boltzmann constant", "R": "gas constant",
    "F": "faraday constant", "G": "gravitational constant", "g": "standard gravity",
    "e": "elementary charge", "m_e": "electron mass", "m_p": "proton mass", "m_n": "neutron mass",
}


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Return a value in another unit, with that unit: 5 km in mi is "3.10685596119 mi".

    Units are names or symbols that pint knows, with * / ^ and parentheses: km/h, degC, J/(mol*K).
    Raises ToolError.
    """
    _check_unit(from_unit)
    _check_unit(to_unit)
    import pint

    try:
        converted = float(_registry().Quantity(value, from_unit).to(to_unit).magnitude)
    except pint.UndefinedUnitError as error:
        names = (error.unit_names,) if isinstance(error.unit_names, str) else error.unit_names
        raise ToolError(f"unknown unit {quote(', '.join(names))}") from None
    except pint.DimensionalityError:
        raise ToolError(f"{quote(from_unit)} cannot be converted to {quote(to_unit)}") from None
    except (OverflowError, ZeroDivisionError):
        raise ToolError("the number is too large") from None
    except (pint.PintError, AssertionError, SyntaxError, TypeError, ValueError):
        # Pint's parser asserts, rather than says, that an operand is missing.
        raise ToolError(f"cannot read {quote(from_unit)} or {quote(to_unit)} as a unit") from None
    if not math.isfinite(converted):
        raise ToolError("the number is too large")
    return f"{format_number(converted)} {to_unit.strip()}"


def physical_constant(name: str) -> str:
    """Return a constant of CONSTANTS, by its name or symbol, with its unit. Raises ToolError."""
    wanted = SYMBOLS.get(name.strip(), " ".join(name.lower().replace("_", " ").split()))
    wanted = wanted.removeprefix("the ").replace("'s ", " ")
    if wanted not in CONSTANTS:
        near = difflib.get_close_matches(wanted[:MAX_UNIT_CHARACTERS], CONSTANTS, n=3, cutoff=0.5)
        known = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(CONSTANTS)}"
        raise ToolError(f"unknown constant {quote(name)}; {known}")
    constant, unit = CONSTANTS[wanted]
    value = float(_registry().Quantity(1, constant).to(unit).magnitude)
    return f"{format_number(value)} {unit}".strip()


@functools.cache
def _registry() -> UnitRegistry[float]:
    import pint

    return pint.UnitRegistry()


def _check_unit(unit: str) -> None:
    """Refuse what is no unit, and what could cost much to work out."""
    if len(unit) > MAX_UNIT_CHARACTERS:
        raise ToolError(f"a unit is longer than {MAX_UNIT_CHARACTERS} characters")
    if not unit.strip():
        raise ToolError("a unit is empty")
    position = depth = 0
    while position < len(unit):
        token = UNIT_TOKEN.match(unit, position)
        if token is None:
            raise ToolError(f"cannot read {quote(unit)} as a unit, at {quote(unit[position:])}")
        depth += (token["open"] is not None) - (token["close"] is not None)
        if not 0 <= depth <= MAX_DEPTH:
            raise ToolError(f"the parentheses of {quote(unit)} do not match or nest too deep")
        if token["end"] is not None:
            break
        position = token.end()
    if depth:
        raise ToolError(f"the parentheses of {quote(unit)} do not match")


TOOLS = (
    define_tool(
        convert_units, "Convert units",
        {"value": "number", "from_unit": "string", "to_unit": "string"},
    ),
    define_tool(physical_constant, "Physical constant", {"name": "string"}),
)
