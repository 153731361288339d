"""Molar masses, balanced equations, and amounts by them."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from svend.tools.formatting import format_number
from svend.tools.tool import ToolError, define_tool, quote

MAX_EQUATION_CHARACTERS = 300
MAX_FORMULA_CHARACTERS = 80
MAX_SUBSTANCES = 12
MAX_GROUPS = 6  # in brackets of one kind
# Atomic weights are known to four to six significant digits.
MASS_DECIMALS = 3
AMOUNT_DIGITS = 6

SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
DASHES_AND_DOTS = str.maketrans(
    {"\u2212": "-", "\u00b7": ".", "\u2022": ".", "\u22c5": ".", "*": "."}
)
STATE = re.compile(r"\s*\((s|l|g|aq)\)$")
PART = r"[A-Z(\[][A-Za-z0-9()\[\]]*"
FORMULA = re.compile(rf"{PART}(\.\d*{PART})*")
CHARGE = re.compile(r"(?P<base>.*?)\^((?P<size>\d?)(?P<sign>[+-])|(?P<sign2>[+-])(?P<size2>\d))")
# In Fe3+ and [Fe(CN)6]4- the digit belongs to the charge; in NH4+ it counts atoms.
SIZED_CHARGE = re.compile(r"(?P<base>[A-Z][a-z]?|.*\])(?P<size>\d)(?P<sign>[+-])")
COEFFICIENT = re.compile(r"(\d+([./]\d+)?\s*)?(?P<formula>.*)", re.DOTALL)
ARROW = re.compile(r"\s<?[-=]+>?\s|<->|<=>|->|=>|=|[\u2192\u27f6\u21cc\u21d2]")


@dataclass(frozen=True)
class Substance:
    """A substance: its formula in plain characters, its atoms, and its charge in units of e."""

    formula: str
    atoms: dict[str, int]
    charge: int
    molar_mass: float


def molar_mass(formula: str) -> str:
    """Return a substance's molar mass in g/mol, of the natural isotopes, to three decimals.

    Formulas are as in Ca(OH)2, CuSO4.5H2O, SO4^2-, NH4+, Fe3+ (which is Fe^3+), [Fe(CN)6]4-, D2O.
    Raises ToolError.
    """
    substance = _read_substance(formula)
    if not substance.atoms:
        raise ToolError("an electron has no molar mass here; give a formula")
    return f"{format_number(round(substance.molar_mass, MASS_DECIMALS))} g/mol"


def balance_equation(equation: str) -> str:
    """Return an equation with its smallest whole coefficients, those of 1 left out.

    Substances stand between plus signs, the sides on either side of ->; coefficients and states
    such as (aq) may be given and are not heeded; e- is an electron. Raises ToolError where no
    coefficients balance it, or more than one choice does.
    """
    reactants, products = _read_equation(equation)
    coefficients = _balance(reactants, products)
    terms = [
        substance.formula if coefficient == 1 else f"{coefficient} {substance.formula}"
        for substance, coefficient in zip(reactants + products, coefficients, strict=True)
    ]
    left, right = terms[:len(reactants)], terms[len(reactants):]
    return f"{' + '.join(left)} -> {' + '.join(right)}"


def stoichiometry(
    equation: str, given: str, amount: float, unit: str, wanted: str, wanted_unit: str | None = None
) -> str:
    """Return how much of one substance goes with an amount of another in a reaction.

    The equation need not be balanced; both substances stand in it. Units are g or mol; the result
    has the given amount's unless another is wanted, and six significant digits. Raises ToolError.
    """
    if amount <= 0:
        raise ToolError("the amount must be positive")
    reactants, products = _read_equation(equation)
    substances = reactants + products
    coefficients = dict(zip(
        [substance.formula for substance in substances], _balance(reactants, products), strict=True
    ))
    known, asked = (_find(formula, substances) for formula in (given, wanted))
    ratio = Fraction(coefficients[asked.formula], coefficients[known.formula])
    moles = (amount / known.molar_mass if unit == "g" else amount) * float(ratio)
    wanted_unit = wanted_unit or unit
    result = moles * asked.molar_mass if wanted_unit == "g" else moles
    return f"{format_number(result, AMOUNT_DIGITS)} {wanted_unit}"


def _find(formula: str, substances: list[Substance]) -> Substance:
    canonical = _read_substance(formula).formula
    for substance in substances:
        if substance.formula == canonical and substance.atoms:
            return substance
    there = ", ".join(substance.formula for substance in substances)
    raise ToolError(f"{quote(formula)} is not in the equation, which has {there}")


def _read_equation(equation: str) -> tuple[list[Substance], list[Substance]]:
    if len(equation) > MAX_EQUATION_CHARACTERS:
        raise ToolError(f"the equation is longer than {MAX_EQUATION_CHARACTERS} characters")
    sides = ARROW.split(equation)
    if len(sides) != 2 or not all(side.strip() for side in sides):
        raise ToolError("an equation is reactants -> products, as in H2 + O2 -> H2O")
    reactants, products = (_read_side(side) for side in sides)
    formulas = [substance.formula for substance in reactants + products]
    if len(formulas) > MAX_SUBSTANCES:
        raise ToolError(f"more than {MAX_SUBSTANCES} substances")
    if repeated := {formula for formula in formulas if formulas.count(formula) > 1}:
        raise ToolError(f"{min(repeated)} stands in the equation more than once")
    return reactants, products


def _read_side(side: str) -> list[Substance]:
    # Without spaces around it a plus may be a charge, unless a formula follows.
    terms = re.split(r"\s\+\s", side) if " + " in side else re.split(r"\+(?=\s*[\d(\[A-Z])", side)
    substances = []
    for term in terms:
        matched = COEFFICIENT.fullmatch(term.strip())
        assert matched is not None
        substances.append(_read_substance(matched["formula"]))
    return substances


def _read_substance(formula: str) -> Substance:
    text = SUPERSCRIPTS.sub(lambda matched: f"^{matched[0]}", formula)
    text = STATE.sub("", unicodedata.normalize("NFKC", text).translate(DASHES_AND_DOTS).strip())
    if text in ("e-", "e^-"):
        return Substance("e-", {}, -1, 0.0)
    base, charge = _split_charge(text)
    groups = max(base.count("("), base.count("["))
    if len(base) > MAX_FORMULA_CHARACTERS or groups > MAX_GROUPS or re.search(r"\d{5}", base):
        raise ToolError(f"the formula {quote(formula)} is too large")
    if not FORMULA.fullmatch(base):
        raise ToolError(f"{quote(formula)} is not a chemical formula, such as Ca(OH)2 or SO4^2-")
    from molmass import Formula, FormulaError

    sign = "+" if charge > 0 else "-"
    written = f"{base}_{abs(charge)}{sign}" if charge else base
    try:
        # A formula only: no names of groups (Me), sequences of amino acids or mass fractions.
        read = Formula(written, parse_groups=False, parse_oligos=False, parse_fractions=False)
        atoms = {symbol: item.count for symbol, item in read.composition().items()}
    except FormulaError as error:
        reason = str(error).partition("\n")[0]
        raise ToolError(f"{quote(formula)} is not a chemical formula: {reason}") from None
    atoms.pop("e-", None)
    size = abs(charge) if abs(charge) > 1 else ""
    return Substance(f"{base}^{size}{sign}" if charge else base, atoms, charge, read.mass)


def _split_charge(text: str) -> tuple[str, int]:
    if matched := CHARGE.fullmatch(text):
        size, sign = matched["size"] or matched["size2"], matched["sign"] or matched["sign2"]
    elif matched := SIZED_CHARGE.fullmatch(text):
        size, sign = matched["size"], matched["sign"]
    elif text.endswith(("+", "-")):
        if re.search(r"\d\d.$", text):
            raise ToolError(f"write the charge of {quote(text)} after ^, as in SO4^2-")
        return text[:-1], 1 if text[-1] == "+" else -1
    else:
        return text, 0
    return matched["base"], int(f"{sign}{size or 1}")


def _balance(reactants: list[Substance], products: list[Substance]) -> list[int]:
    """Return the smallest whole coefficients by which atoms and charge are conserved.

    They span the null space of the matrix of each substance's atoms and charge.
    """
    from sympy import QQ
    from sympy.polys.matrices import DM

    signed = [(substance, 1) for substance in reactants]
    signed += [(substance, -1) for substance in products]
    elements = sorted({element for substance, _ in signed for element in substance.atoms})
    rows = [[sign * s.atoms.get(element, 0) for s, sign in signed] for element in elements]
    rows.append([sign * substance.charge for substance, sign in signed])
    solutions = DM(rows, QQ).nullspace(divide_last=True).to_list()
    if len(solutions) > 1:
        raise ToolError("the equation can be balanced in more than one way; give one reaction")
    if not solutions:
        missing = {e for s, _ in signed for e in s.atoms} - _common(reactants, products)
        lacking = f": {', '.join(sorted(missing))} is on one side only" if missing else ""
        raise ToolError(f"the equation cannot be balanced{lacking}")
    fractions = [Fraction(int(QQ.numer(x)), int(QQ.denom(x))) for x in solutions[0]]
    # One of them is 1, so that this scale leaves no common divisor and no sign to turn.
    scale = math.lcm(*(x.denominator for x in fractions))
    coefficients = [int(x * scale) for x in fractions]
    if min(coefficients) <= 0:
        raise ToolError("the equation cannot be balanced with every substance on its side")
    return coefficients


def _common(reactants: list[Substance], products: list[Substance]) -> set[str]:
    left, right = ({e for s in side for e in s.atoms} for side in (reactants, products))
    return left & right


MASS_OR_MOLES = {"type": "string", "enum": ["g", "mol"]}
TOOLS = (
    define_tool(molar_mass, "Molar mass in g/mol", {"formula": "string"}),
    define_tool(balance_equation, "Balance a reaction", {"equation": "string"}),
    define_tool(
        stoichiometry, "Amount of one substance from another in a reaction",
        {"equation": "string", "given": "string", "amount": "number", "unit": MASS_OR_MOLES,
         "wanted": "string"},
        {"wanted_unit": MASS_OR_MOLES},
    ),
)
