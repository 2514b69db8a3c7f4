//! Latency distributions as an SVG picture: a panel for each cell, a line for each back end.
//!
//! The x axis is the share of requests that are slower, 1 in 10, 1 in 100 and so on, to the right ever rarer; the y axis
//! is the latency, logarithmic. A good back end's line is low and flat. Written by hand: a library for it weighs more than the
//! binary.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use super::report::{Cell, Report, heading, micros};

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
            text(svg, LEFT - 8.0, y + 4.0, "end", "#555", &format!("{} us", micros(nanoseconds)));
            power += 1.0;
        }
    }
}

fn line(svg: &mut String, x1: f64, y1: f64, x2: f64, y2: f64) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>"
    );
}
