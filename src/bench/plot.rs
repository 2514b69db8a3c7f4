//! SVG pictures: latency distributions, a panel for each cell and a line for each back end; and a mirror's life.
//!
//! Of a distribution, the x axis is the share of requests that are slower, 1 in 10, 1 in 100 and so on, to the right ever rarer; the y axis
//! is the latency, logarithmic. Of a life, the x axis is time; above, what was done in each slice of it, below, the longest
//! latency there, logarithmic; the phases lie behind both as bands. A good back end's line is low and flat. Written by hand: a library for it weighs more than the
//! binary.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use super::life::{Life, SLICE};
use super::report::{Cell, Report, heading};
use crate::load::Phase;

const WIDTH: f64 = 760.0;
const PANEL: f64 = 300.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;
/// To one request in ten thousand; what is rarer is the maximum, which the table has.
const DECADES: f64 = 4.0;
/// Points of a line.
const POINTS: u32 = 160;
/// Colours that can be told apart by most eyes, in print too (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// The picture of a report.
pub(crate) fn distributions(report: &Report) -> String {
    #[allow(clippy::cast_precision_loss)] // a few panels
    let height = PANEL * report.cells.len().max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    let mut top = 0.0;
    for cell in &report.cells {
        panel(&mut svg, cell, top);
        top += PANEL;
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, cell: &Cell, top: f64) {
    let lines: Vec<(&str, Histogram<u64>)> = cell
        .targets
        .iter()
        .filter_map(|target| Some((target.name.as_str(), target.latency()?)))
        .collect();
    let Some(scale) = Scale::of(lines.iter().map(|(_, latency)| latency), top) else { return };
    text(svg, LEFT, top + 22.0, "start", "#000", &heading(&cell.job));
    scale.axes(svg);
    for (index, (name, latency)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut path = String::new();
        for point in 0..=POINTS {
            let decade = DECADES * f64::from(point) / f64::from(POINTS);
            let value = latency.value_at_quantile(1.0 - 10_f64.powf(-decade));
            let letter = if point == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{letter}{:.1} {:.1}", scale.x(decade), scale.y(value));
        }
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        );
        #[allow(clippy::cast_precision_loss)] // a few lines
        let y = top + TOP + 14.0 + 16.0 * index as f64;
        text(svg, WIDTH - RIGHT + 12.0, y, "start", colour, name);
    }
}

/// Where a latency and a share lie in a panel.
struct Scale {
    top: f64,
    /// Powers of ten, nanoseconds.
    low: f64,
    high: f64,
}

impl Scale {
    #[allow(clippy::cast_precision_loss)]
    fn of<'a>(all: impl Iterator<Item = &'a Histogram<u64>>, top: f64) -> Option<Self> {
        let (mut low, mut high) = (f64::MAX, f64::MIN);
        for latency in all.filter(|latency| !latency.is_empty()) {
            low = low.min((latency.min().max(1) as f64).log10().floor());
            high = high.max((latency.value_at_quantile(0.9999).max(1) as f64).log10().ceil());
        }
        (low <= high).then(|| Self { top, low, high: high.max(low + 1.0) })
    }

    #[allow(clippy::unused_self)]
    fn x(&self, decade: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * decade / DECADES
    }

    #[allow(clippy::cast_precision_loss)]
    fn y(&self, nanoseconds: u64) -> f64 {
        let at = (nanoseconds.max(1) as f64).log10().clamp(self.low, self.high);
        let share = (at - self.low) / (self.high - self.low);
        self.top + PANEL - BOTTOM - (PANEL - TOP - BOTTOM) * share
    }

    fn axes(&self, svg: &mut String) {
        let (bottom, right) = (self.top + PANEL - BOTTOM, WIDTH - RIGHT);
        for (decade, label) in
            [(0.0, "all"), (1.0, "p90"), (2.0, "p99"), (3.0, "p99.9"), (4.0, "p99.99")]
        {
            let x = self.x(decade);
            line(svg, x, self.top + TOP, x, bottom);
            text(svg, x, bottom + 16.0, "middle", "#555", label);
        }
        let mut power = self.low;
        while power <= self.high {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most a minute
            let nanoseconds = 10_f64.powf(power) as u64;
            let y = self.y(nanoseconds);
            line(svg, LEFT, y, right, y);
            text(svg, LEFT - 8.0, y + 4.0, "end", "#555", &tick(nanoseconds));
            power += 1.0;
        }
    }
}

/// A power of ten of nanoseconds, as an axis names it.
fn tick(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{} µs", nanoseconds / 1_000),
        1_000_000..1_000_000_000 => format!("{} ms", nanoseconds / 1_000_000),
        _ => format!("{} s", nanoseconds / 1_000_000_000),
    }
}

fn line(svg: &mut String, x1: f64, y1: f64, x2: f64, y2: f64) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>"
    );
}

/// Bands behind the phases of a life: pale, so that lines show.
const BANDS: [&str; 5] = ["#f4f4f4", "#fdebd0", "#d5f0e3", "#fadbd8", "#e3edf7"];
/// Points of a line across a life.
const COLUMNS: usize = 600;

/// The picture of a mirror's life.
pub(crate) fn timeline(life: &Life) -> String {
    let height = 2.0 * PANEL;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    let total = life.ends.last().map_or(0.0, |end| end.as_secs_f64()).max(f64::MIN_POSITIVE);
    let x = |seconds: f64| LEFT + (WIDTH - LEFT - 20.0) * (seconds / total).min(1.0);
    text(&mut svg, LEFT, 22.0, "start", "#000", &heading(&life.job));
    let mut begin = 0.0;
    for (index, (phase, end)) in Phase::ALL.iter().zip(&life.ends).enumerate() {
        let end = end.as_secs_f64();
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
            x(begin),
            (x(end) - x(begin)).max(1.0),
            height - TOP - BOTTOM,
            BANDS[index]
        );
        // A switch-over is too narrow for its name: it stands lower.
        let y = if *phase == Phase::Switching {
            height - BOTTOM + 32.0
        } else {
            height - BOTTOM + 16.0
        };
        text(&mut svg, x(f64::midpoint(begin, end)), y, "middle", "#555", phase.name());
        begin = end;
    }
    let columns = columns(life);
    let most = columns.iter().map(|column| column.0).fold(1.0, f64::max);
    let high = columns.iter().map(|column| column.1).fold(1.0, f64::max).log10().ceil();
    let rate = |value: f64| PANEL - 10.0 - (PANEL - TOP - 10.0) * value / most;
    let latency = |nanoseconds: f64| {
        let at = (nanoseconds.max(1000.0).log10() - 3.0) / (high - 3.0).max(1.0);
        height - BOTTOM - (PANEL - BOTTOM - 10.0) * at
    };
    curve(&mut svg, &columns, total, COLOURS[0], |column| Some(rate(column.0)), x);
    // Where nothing ended there is no latency: a gap, not a low one.
    let longest = |column: &(f64, f64)| (column.1 > 0.0).then(|| latency(column.1));
    curve(&mut svg, &columns, total, COLOURS[1], longest, x);
    text(&mut svg, WIDTH - 26.0, TOP + 16.0, "end", COLOURS[0], "requests a second");
    text(&mut svg, WIDTH - 26.0, PANEL + 22.0, "end", COLOURS[1], "longest latency");
    text(&mut svg, LEFT - 8.0, rate(most) + 10.0, "end", COLOURS[0], &format!("{most:.0}/s"));
    text(&mut svg, LEFT - 8.0, rate(0.0), "end", COLOURS[0], "0");
    let mut power = 3.0;
    while power <= high {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most a minute
        let label = tick(10_f64.powf(power) as u64);
        let y = latency(10_f64.powf(power));
        line(&mut svg, LEFT, y, WIDTH - 20.0, y);
        text(&mut svg, LEFT - 8.0, y + 4.0, "end", COLOURS[1], &label);
        power += 1.0;
    }
    svg.push_str("</svg>\n");
    svg
}

/// Requests a second and the longest latency, nanoseconds, of each column of the picture.
#[allow(clippy::cast_precision_loss)]
fn columns(life: &Life) -> Vec<(f64, f64)> {
    let wide = life.slices.len().div_ceil(COLUMNS).max(1);
    let column = |slices: &[super::life::Slice]| {
        let requests: u64 = slices.iter().map(|it| u64::from(it.requests)).sum();
        let longest = slices.iter().map(|it| it.longest).max().unwrap_or(0);
        (requests as f64 / (SLICE.as_secs_f64() * slices.len() as f64), longest as f64)
    };
    life.slices.chunks(wide).map(column).collect()
}

fn curve(
    svg: &mut String,
    columns: &[(f64, f64)],
    total: f64,
    colour: &str,
    y: impl Fn(&(f64, f64)) -> Option<f64>,
    x: impl Fn(f64) -> f64,
) {
    let mut path = String::new();
    let mut letter = 'M';
    for (index, column) in columns.iter().enumerate() {
        let Some(y) = y(column) else {
            letter = 'M';
            continue;
        };
        #[allow(clippy::cast_precision_loss)] // a few hundred
        let at = total * (index as f64 + 0.5) / columns.len() as f64;
        let _ = write!(path, "{letter}{:.1} {y:.1}", x(at));
        if letter == 'M' {
            // A column alone between gaps is a dot: a line of no length with round ends.
            path.push_str("h0");
        }
        letter = 'L';
    }
    let _ = writeln!(
        svg,
        "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.2\" stroke-linecap=\"round\"/>"
    );
}
