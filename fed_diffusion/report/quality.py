"""How good the generated images are, what the model may give away, and what is promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fed_diffusion.report.curves import is_number
from fed_diffusion.report.markup import (
    MOST_ROWS,
    folded,
    mapping,
    mappings,
    more,
    number,
    pair,
    part,
    percent,
    plain,
    section,
    soft,
    table,
    warning,
)
from fed_diffusion.report.records import Record

FIGURES = {
    "fid": "FID",
    "fid_floor": "FID floor",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
JUDGE = {"extractor": "extractor", "extractor_sha256": "SHA-256 of its weights"}
STATED = JUDGE | {
    "reference": "reference",
    "samples": "generated images",
    "nfe": "network evaluations per image (NFE)",
}


def quality_section(record: Record) -> str:
    """Return the figures that the run itself ended with, and what they depend on."""
    quality = mapping(record.results.get("quality"))
    if not quality:
        said = "No quality figures." if record.results else "Quality is measured at the end."
        return section("Quality", soft(said))
    others = "".join(
        part(f"By {plain(name)}", _figures(mapping(other)) + _stated(mapping(other), JUDGE))
        for name, other in mapping(quality.get("others")).items()
    )
    later = part("Later evaluations", _later(record))
    if quality.get("why"):
        return section("Quality", _figures(quality) + others + later)
    text = (
        "FID and KID are distances from the real images: lower is better, and the floor is what "
        "real images have against real ones. Precision is the part of the generated images that "
        "look like real ones, recall the part of the real ones whose like is generated. Figures "
        "compare only with others of the same extractor, reference and number of images. All "
        "images are uint8, 0 to 255."
    )
    seed = plain(quality.get("seed", record.fact("seed")))
    measured = _stated(quality, STATED, ("seed", seed))
    intervals = mapping(quality.get("intervals"))
    how = folded("How the intervals were made", f"<p>{plain(intervals.get('how'))}</p>")
    how = how if intervals.get("how") else ""
    return section("Quality", f"{_figures(quality)}<p>{text}</p>{measured}{others}{how}{later}")


def _figures(found: Mapping[str, Any]) -> str:
    """Return the table of one judge's figures with their intervals, or why there is none."""
    because = found.get("extractor_because")
    note = f"<p>Why this extractor: {plain(because)}.</p>" if because else ""
    if why := found.get("why"):
        return warning(f"No figures: {plain(why)}.") + note
    intervals = mapping(found.get("intervals"))
    rows = [
        (label, pair(found[key], " ± "), pair(intervals.get(key), " to "))
        for key, label in FIGURES.items()
        if found.get(key) is not None
    ]
    return table(("figure", "value", "95 % interval"), rows, text=(1,)) + note


def _later(record: Record) -> str:
    """Evaluations that came after the run's own, one row for each judge."""
    rows = []
    for entry in record.evaluations:
        if entry.get("number") == record.results.get("evaluation"):
            continue
        quality = mapping(entry.get("quality"))
        for found in (quality, *map(mapping, mapping(quality.get("others")).values())):
            figures = [pair(found.get(key), " ± ") for key in ("fid", "fid_floor")]
            stated = [number(quality.get(key)) for key in ("reference", "samples")]
            rows.append(
                (plain(entry.get("date")), plain(found.get("extractor")), *stated, *figures)
            )
    head = ("date", "extractor", "reference", "generated images", "FID", "FID floor")
    return table(head, rows[:MOST_ROWS], text=(1, 2)) + more(len(rows))


def _stated(found: Mapping[str, Any], labels: Mapping[str, str], *more: tuple[str, str]) -> str:
    rows = [(label, number(found[key])) for key, label in labels.items() if found.get(key)]
    return table(("measured with", "value"), [*rows, *more], text=(1,))


def privacy_section(record: Record) -> str:
    """Return what leaves a client, what is promised, and whether images are copied."""
    parts = (
        part("What leaves a client", _leaves(record)),
        part("What is promised", _promised(record)),
        part("Copies of training images", _copies(record)),
    )
    return section("Privacy and copies", "".join(parts))


def _leaves(record: Record) -> str:
    differences = mapping(record.settings.get("wire")).get("differences")
    what = "what training changed in the network" if differences else "the network as it trained it"
    text = (
        f"A client sends no image to the server. It sends {what}, and a few numbers about that: "
        "its losses, how many images it trained on, and how long it took. The server sees "
        "what each client sends, and anyone who sees that can learn something about the images "
        "behind it."
    )
    if record.data:
        text += (
            " In this run the server had the images as well, because it simulated the clients or "
            "measured quality with their images."
        )
    return f"<p>{text}</p>"


def _promised(record: Record) -> str:
    found = mapping(record.results.get("privacy"))
    if found:
        return f"<p>{_in_words(found)}</p>{folded('In numbers', _guarantee(found))}"
    if mapping(record.settings.get("privacy")).get("clip") is not None:
        return soft("The run is one with differential privacy; its guarantee is stated at the end.")
    return (
        "<p>There is no formal guarantee: the run is one without differential privacy "
        "(privacy.clip is not set). Somebody who has the model may find out more than what is "
        "looked for below.</p>"
    )


def _in_words(found: Mapping[str, Any]) -> str:
    """Return the guarantee for a reader who does not know what epsilon is."""
    epsilon, delta = found.get("epsilon"), found.get("delta")
    if not is_number(epsilon):
        return "The noise is too small for any guarantee: ε is not finite."
    most = f"of at most {math.exp(epsilon):.4g}" if epsilon < 13 else "that may exceed a million"
    return (
        "Suppose that one client had not taken part. Whatever somebody concludes from the trained "
        "model would then have been about as likely as it is now: its probability would differ by "
        f"a factor {most} (ε = {number(epsilon)}), except with a probability of "
        f"{number(delta)} (δ). A factor near 1 means that nobody can tell whether a client took "
        "part. As a rule of thumb, ε up to 1 is called strong, and above 10 the guarantee says "
        "little by itself. It is about the model, and not about this page."
    )


def _guarantee(found: Mapping[str, Any]) -> str:
    repeated = found.get("repeated")
    again = (
        f" ({number(repeated)} of them opened again, after a stop or below quorum)"
        if repeated
        else ""
    )
    who = " at least, which clients add in shares" if found.get("noise") == "clients" else ""
    text = (
        f"({number(found.get('epsilon'))}, {number(found.get('delta'))})-differential privacy of "
        f"clients after {number(found.get('rounds'))} rounds{again}: differences clipped to "
        f"{number(found.get('clip'))}, noise of {number(found.get('sigma'))} on their sum{who}, "
        f"each client drawn with probability {number(found.get('sampling_rate'))}. It covers "
        f"{plain(found.get('covers'))}. The noise is the operating system's: this run cannot be "
        "repeated to the bit."
    )
    return f"<p>{text}</p>"


def _copies(record: Record) -> str:
    """Return whether generated images are nearer to training images than held-out ones are."""
    quality = mapping(record.results.get("quality"))
    found = mapping(quality.get("memorisation"))
    why = found.get("why") or (None if found else quality.get("why"))
    if why:
        return soft(f"Copies were not looked for: {plain(why)}.")
    if not found:
        return "" if record.results else soft("Copies are looked for at the end.")
    copied = found.get("copied") or []
    verdict = (
        warning(f"Images of clients {pair(copied, ', ')} are copied.")
        + "<p>More generated images are nearly the same as one of these clients' training images "
        "than chance explains. Look at them before the model is given to anybody.</p>"
        if copied
        else "<p>No client's training images were found among the generated ones more often than "
        "chance explains.</p>"
    )
    text = (
        f"{_share(found.get('closer'))} of the generated images are nearly the same as a training "
        "image. Of real images that no client trained on it would be "
        f"{_share(found.get('expected'))}. Images are compared pixel by pixel: a copy that was "
        "moved, cut or recoloured is not found."
    )
    return f"{verdict}<p>{text}</p>{folded('In numbers', _copies_in_numbers(found))}"


def _share(value: Any) -> str:
    return percent(value) if is_number(value) else "An unknown part"


def _copies_in_numbers(found: Mapping[str, Any]) -> str:
    text = (
        f"{number(found.get('closer'))} of the generated images are nearer to a training image "
        f"than {number(found.get('tau'))} grey levels (root mean square); of held-out images it "
        f"would be {number(found.get('expected'))} (p = {number(found.get('p_value'))}). Median "
        f"distance: {number(found.get('median_ratio'))} times that of held-out images."
    )
    clients = mappings(found.get("clients"))
    keys = ("client", "images", "share", "held_out_share", "closer")
    rows = [[number(client.get(key)) for key in keys] for client in clients[:MOST_ROWS]]
    head = ("client", "images", "nearest to generated", "to held out", "copied")
    return f"<p>{text}</p>{table(head, rows)}{more(len(clients))}"
