"""What the studio looks like in the browser: the form, the figure of next tokens, the completions side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import plotly.graph_objects as go
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from spd_lens.errors import SPDError
from spd_lens.subspace import resolve_rank

from ..style import COLORS, NULL_COLOR, figure, plain
from .studio import MAX_NEW_TOKENS, MAX_PROMPT, NAMES, Answer, Ask, Said, Studio

log = logging.getLogger(__name__)

_LOOKS = {
    "base": (COLORS[7], ""), "projected": (COLORS[0], "/"), "random": (NULL_COLOR, "."), "spd": (COLORS[1], "x"),
}  # fmt: skip
"""Colour and pattern of each policy's bars: never colour alone."""

# attributes whose names are no Python names
_CHOSEN: dict[str, Any] = {"data-chosen": "yes"}
_NOT_CHOSEN: dict[str, Any] = {"data-chosen": "no"}
_LIVE: dict[str, Any] = {"aria-live": "polite"}

_HINT = (
    "Write a prompt and press Generate: the same prompt with the same noise, without and with the projection, and "
    "beside them a random subspace of the same ranks, which shows what any projection of that size does."
)
EXAMPLE = "Tom has 12 apples and buys 30 more. He gives half of them away. How many apples does he have now?"


def layout(studios: Mapping[str, Studio]) -> html.Div:
    """The whole page."""
    names = list(studios)
    first = studios[names[0]]
    return html.Div(
        [
            dcc.Store(id="theme-choice"),
            dcc.Store(id="widths", data={"head": _width(studios, True), "joint": _width(studios, False)}),
            html.Header(
                [
                    html.Div([html.H1("SPD dashboard"), html.P(_facts(first, names), className="soft")]),
                    html.Button("Light / dark", id="theme", type="button"),
                ],
                className="top",
            ),
            html.Nav(
                [
                    html.Button("Generate", id="tab-studio", type="button", **_CHOSEN),
                    html.Button("Views", id="tab-views", type="button", **_NOT_CHOSEN),
                ],
                className="tabs",
            ),
            html.Main(
                [
                    _form(studios, first, names),
                    html.Div(html.P(_HINT, className="empty"), id="answer", className="answer", **_LIVE),
                ],
                className="studio",
                id="studio",
            ),
            html.Div(html.Iframe(src="/views", title="Views", className="frame"), id="views", hidden=True),
        ]
    )


def _facts(studio: Studio, names: list[str]) -> str:
    return f"{studio.pair.name.rsplit('/', 1)[-1]} · {', '.join(names)}"


def _form(studios: Mapping[str, Studio], first: Studio, names: list[str]) -> html.Div:
    config = first.subject.run.config
    used = first.subject.subspace
    own_layers = sorted({site.layer for site in used.sites})
    width = first.width(config.per_head)
    also = [{"label": "random subspace of the same ranks", "value": "random"}]
    if any(studio.adapter for studio in studios.values()):
        also.append({"label": "the model after SPD", "value": "spd"})
    return html.Div(
        [
            _labelled("Prompt", dcc.Textarea(id="prompt", value=EXAMPLE, maxLength=MAX_PROMPT)),
            html.Div(
                _group("Subspace of", dcc.RadioItems(names, names[0], id="run", className="choices")),
                hidden=len(names) < 2,
            ),
            _group("Layers", dcc.Checklist(first.layers, own_layers, id="layers", className="choices")),
            _group(
                "Kinds",
                dcc.Checklist(
                    [{"label": kind.upper(), "value": kind} for kind in first.kinds],
                    sorted({site.kind for site in used.sites}), id="kinds", className="choices",
                ),
            ),
            _group(
                "Projector",
                dcc.RadioItems(
                    [{"label": "per head", "value": "head"}, {"label": "joint", "value": "joint"}],
                    "head" if config.per_head else "joint", id="form", className="choices",
                ),
            ),
            _labelled("Rank", _range("rank", 1, width, 1, resolve_rank(config.rank, width)), "rank-label"),
            _labelled("Strength", _range("strength", 0, 1, 0.05, config.strength), "strength-label"),
            html.Div(
                [
                    _labelled("New tokens", _number("tokens", 1, MAX_NEW_TOKENS, min(96, config.max_new_tokens))),
                    _labelled("Seed", _number("seed", 0, 2**32 - 1, config.seed)),
                    _labelled("Temperature (0: greedy)", _number("temperature", 0, 10, 0, "any")),
                ],
                className="two",
            ),
            _group("Beside it", dcc.Checklist(also, ["random"], id="also", className="choices")),
            html.Button("Generate", id="go", type="button", className="go"),
            html.Div(id="message", className="message", role="alert"),
        ],
        className="ask",
    )  # fmt: skip


def _labelled(text: str, field: Any, id: str | None = None) -> html.Label:
    title = html.Span(text, id=id) if id else text
    return html.Label([title, field], className="field")


def _group(text: str, field: Any) -> html.Div:
    return html.Div([html.Span(text), field], className="field", role="group", **_called(text))


def _called(text: str) -> dict[str, Any]:
    return {"aria-label": text}


def _range(id: str, low: float, high: float, step: float, value: float) -> dcc.Input:
    return dcc.Input(id=id, type="range", min=low, max=high, step=step, value=value)


def _number(id: str, low: int, high: int, value: float, step: int | str = 1) -> dcc.Input:
    return dcc.Input(id=id, type="number", min=low, max=high, step=step, value=value)


def add_callbacks(app: Dash, studios: Mapping[str, Studio]) -> None:
    """Wire the form to the studios, and what needs no model to the browser."""

    @app.callback(
        Output("answer", "children"),
        Output("message", "children"),
        Input("go", "n_clicks"),
        State("run", "value"), State("prompt", "value"), State("layers", "value"), State("kinds", "value"),
        State("form", "value"), State("rank", "value"), State("strength", "value"), State("tokens", "value"),
        State("temperature", "value"), State("seed", "value"), State("also", "value"),
        prevent_initial_call=True,
        running=[(Output("go", "disabled"), True, False), (Output("go", "children"), "Generating…", "Generate"),
                 (Output("answer", "className"), "answer busy", "answer")],
    )  # fmt: skip
    def generate(_: int, run: str, prompt: str, layers: list[int], kinds: list[str], form: str, *numbers: Any) -> Any:
        rank, strength, tokens, temperature, seed, also = numbers
        try:
            if run not in studios:
                raise SPDError(f"there is no run {run!r}; choose from {', '.join(studios)}")
            ask = Ask(
                prompt, layers or [], kinds or [], _as_int(rank), form == "head", _as_float(strength), _as_int(tokens),
                _as_float(temperature), _as_int(seed), also or [],
            )  # fmt: skip
            answer = studios[run].answer(ask)
        except SPDError as error:
            return no_update, str(error)
        except Exception:
            log.exception("the generation failed")
            return no_update, "the generation failed; the terminal that runs this app says why"
        return shown(answer, ask), ""

    in_browser = partial(ClientsideFunction, "studio")  # studio.js
    app.clientside_callback(in_browser("theme"), Output("theme-choice", "data"), Input("theme", "n_clicks"))
    app.clientside_callback(
        in_browser("tab"),
        Output("studio", "hidden"), Output("views", "hidden"), Output("tab-studio", "data-chosen"),
        Output("tab-views", "data-chosen"), Input("tab-studio", "n_clicks"), Input("tab-views", "n_clicks"),
        prevent_initial_call=True,
    )  # fmt: skip
    app.clientside_callback(
        in_browser("numbers"),
        Output("rank-label", "children"), Output("strength-label", "children"),
        Input("rank", "value"), Input("strength", "value"), Input("rank", "max"),
    )  # fmt: skip
    app.clientside_callback(
        in_browser("width"),
        Output("rank", "max"), Output("rank", "value"),
        Input("form", "value"), State("widths", "data"), State("rank", "max"), State("rank", "value"),
        prevent_initial_call=True,
    )  # fmt: skip


def _width(studios: Mapping[str, Studio], per_head: bool) -> int:
    return min(studio.width(per_head) for studio in studios.values())


def _as_int(value: Any) -> Any:
    """What a browser sends for a number; anything else stays as it is, for the studio to refuse."""
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def shown(answer: Answer, ask: Ask) -> list[Any]:
    """The answer as components."""
    columns = [_side(said, answer.said[0]) for said in answer.said]
    facts = f"ranks {answer.ranks} · strength {ask.strength:g} · seed {ask.seed} · temperature {ask.temperature:g}"
    return [
        html.Section(
            [
                html.H2("What comes next?"),
                html.P(_next_says(answer), className="says"),
                dcc.Graph(
                    figure=next_tokens(answer), id="next-tokens", responsive=True, style={"height": "420px"},
                    config={"displaylogo": False},
                ),
            ],
            className="panel",
        ),
        html.Section(
            [
                html.H2("What does it say?"),
                html.P(
                    [html.Ins("solid underline"), " only here, not in the base · ", facts],
                    className="legend",
                ),
                html.Article(html.Div(columns, className="sides"), className="card"),
            ],
            className="panel",
        ),
    ]  # fmt: skip


def _side(said: Said, base: Said) -> html.Div:
    is_base = said.policy == base.policy
    end = "ended by itself" if said.ended else "cut at the limit"
    return html.Div(
        [
            html.H4([NAMES[said.policy], html.Small(end)]),
            html.Div(said.text if is_base else _marks(said), className="text", tabIndex=0, id=f"said-{said.policy}"),
        ],
        className="side",
    )


def _marks(said: Said) -> list[Any]:
    parts: list[Any] = []
    for piece in said.pieces:
        words = piece.after.rstrip()
        if piece.same or not words:
            parts.append(piece.after)
        else:
            parts += [html.Ins(words), piece.after[len(words) :]]
    return parts


def _next_says(answer: Answer) -> str:
    changes = [f"{NAMES[said.policy]} {said.kl:.3f}" for said in answer.said[1:]]
    return f"Next token after the prompt. KL from base, in nats: {'; '.join(changes)}."


def next_tokens(answer: Answer) -> go.Figure:
    """Probabilities of the most probable next tokens, a bar per policy."""
    fig = figure("", "probability of the next token", "token")
    labels = [f"{i + 1}. {plain(token)}" for i, token in enumerate(answer.tokens)]  # two tokens may look alike
    for said in answer.said:
        color, shape = _LOOKS[said.policy]
        pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": "rgba(255,255,255,.8)", "size": 7}
        fig.add_bar(
            y=labels, x=list(said.probabilities), name=NAMES[said.policy], orientation="h",
            marker={"color": color, "pattern": pattern},
            hovertemplate="%{y}: %{x:.4f}<extra>" + NAMES[said.policy] + "</extra>",
        )  # fmt: skip
    fig.update_layout(
        barmode="group", bargap=0.25, font_size=13, title=None, margin={"t": 34, "l": 90, "r": 16, "b": 50},
        yaxis={"autorange": "reversed", "type": "category", "title_font_size": 13},
        xaxis={"rangemode": "tozero", "title_font_size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )  # fmt: skip
    return fig
