//! The picture of `map --plot`: an SVG of bounded size, with nothing in it that a viewer would have to fetch.
//!
//! Each space is a grid of cells, in rows from left to right. A cell has the colour of the owner that has most of it,
//! paler where most of it is nobody's. Cells of one colour and strength are one path, so that a picture is at most some
//! tens of kilobytes for each space.

use std::{collections::BTreeMap, fmt::Write as _};

use img_core::{
    image::Image,
    job::plot::{FilePlot, Owner, Plot, Share, Space},
    text,
};

use crate::size::Human;

/// Cells in a row.
const COLUMNS: usize = 64;
/// From one cell to the next, and the gap between them.
const PITCH: usize = 13;
const GAP: usize = 1;
/// Where grids begin: room for the offsets on their left.
const LEFT: usize = 100;
const RIGHT: usize = 24;
/// A line of the legend.
const LINE: usize = 20;
/// Every so many rows say where they begin.
const LABELLED_ROWS: usize = 4;
/// Layers that have a colour of their own; the deeper ones share one.
const LAYER_COLOURS: [&str; 8] =
    ["#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777"];
const DEEPER_COLOUR: &str = "#475569";
const WIDTH: usize = LEFT + COLUMNS * PITCH + RIGHT;

fn colour(owner: Owner) -> &'static str {
    match owner {
        Owner::Layer(depth) => LAYER_COLOURS.get(depth).copied().unwrap_or(DEEPER_COLOUR),
        Owner::Data => LAYER_COLOURS[0],
        Owner::Compressed => LAYER_COLOURS[5],
        Owner::Zero | Owner::Kept => "#94a3b8",
        Owner::Tables => LAYER_COLOURS[1],
        Owner::Refcounts => LAYER_COLOURS[4],
        Owner::Snapshots => LAYER_COLOURS[3],
        Owner::Other => LAYER_COLOURS[6],
        Owner::Nowhere | Owner::Free => "#e8ecf1",
    }
}

fn label(owner: Owner, image: &Image) -> String {
    match owner {
        Owner::Layer(depth) if depth >= LAYER_COLOURS.len() => {
            format!("layers from {} down", LAYER_COLOURS.len())
        }
        Owner::Layer(depth) => format!("layer {depth}: {}", shortened(image.layer_name(depth))),
        Owner::Zero => "zero, says a layer".to_owned(),
        Owner::Nowhere => "in no layer: reads as zeroes".to_owned(),
        Owner::Data => "data of the guest".to_owned(),
        Owner::Compressed => "compressed data".to_owned(),
        Owner::Kept => "kept for what reads as zeroes".to_owned(),
        Owner::Tables => "headers and tables".to_owned(),
        Owner::Refcounts => "reference counts".to_owned(),
        Owner::Snapshots => "snapshots: tables, and data of theirs alone".to_owned(),
        Owner::Other => "bitmaps, rest of clusters, leaks".to_owned(),
        Owner::Free => "free".to_owned(),
    }
}

/// The whole picture.
pub(crate) fn picture(plot: &Plot, image: &Image) -> String {
    let mut drawing = Drawing { body: String::new(), y: 0 };
    let name = shortened(image.layer_name(0));
    drawing.heading(&name, 20);
    let format = image.layers()[0].driver().name();
    let layers = match image.layers().len() {
        1 => "1 layer".to_owned(),
        several => format!("{several} layers"),
    };
    drawing.note(&format!("{format}, {layers}"));
    drawing.space("The guest's disk, by the layer that has it", &plot.guest, image);
    for FilePlot { path, depth, space } in &plot.files {
        let title = format!("Host file of layer {depth}: {}", shortened(&text::from_path(path)));
        drawing.space(&title, space, image);
    }
    if plot.omitted_files > 0 {
        drawing.note(&format!("{} more host files are not shown", plot.omitted_files));
    }
    let height = drawing.y + 24;
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" font-size=\"13\" \
         fill=\"#1e293b\">\n<title>{}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
        escaped(&name),
        drawing.body
    )
}

struct Drawing {
    body: String,
    y: usize,
}

impl Drawing {
    fn put(&mut self, line: std::fmt::Arguments<'_>) {
        self.body.write_fmt(line).expect("a string takes all");
        self.body.push('\n');
    }

    fn heading(&mut self, text: &str, size: usize) {
        self.y += size + 22;
        let y = self.y;
        self.put(format_args!(
            "<text x=\"24\" y=\"{y}\" font-size=\"{size}\" font-weight=\"600\">{}</text>",
            escaped(text)
        ));
    }

    fn note(&mut self, text: &str) {
        self.y += LINE;
        let y = self.y;
        self.put(format_args!("<text x=\"24\" y=\"{y}\" fill=\"#64748b\">{}</text>", escaped(text)));
    }

    fn space(&mut self, title: &str, space: &Space, image: &Image) {
        self.heading(title, 15);
        self.note(&format!("{}; a square is {}", amount(space.len_bytes()), Human(space.cell_bytes())));
        self.y += 10;
        self.body.push_str("<g>\n");
        self.grid(space);
        self.legend(&grouped(space), space.len_bytes(), image);
        self.body.push_str("</g>\n");
    }

    fn grid(&mut self, space: &Space) {
        let mut paths: BTreeMap<(&str, &str), String> = BTreeMap::new();
        for cell in 0..space.cells() {
            let (x, y) = (LEFT + cell % COLUMNS * PITCH, self.y + cell / COLUMNS * PITCH);
            let side = PITCH - GAP;
            let path = paths.entry(look(space, cell)).or_default();
            write!(path, "M{x} {y}h{side}v{side}h-{side}z").expect("a string takes all");
            if cell % (COLUMNS * LABELLED_ROWS) == 0 {
                let (right, base) = (LEFT - 10, y + side - 2);
                let offset = Human(cell as u64 * space.cell_bytes());
                self.put(format_args!(
                    "<text x=\"{right}\" y=\"{base}\" text-anchor=\"end\" font-size=\"11\" fill=\"#64748b\">{offset}</text>"
                ));
            }
        }
        for ((colour, opacity), path) in paths {
            self.put(format_args!("<path fill=\"{colour}\" fill-opacity=\"{opacity}\" d=\"{path}\"/>"));
        }
        self.y += space.cells().div_ceil(COLUMNS) * PITCH;
    }

    fn legend(&mut self, shares: &[(Owner, u64)], len_bytes: u64, image: &Image) {
        self.y += 8;
        for (owner, bytes) in shares {
            self.y += LINE;
            let (top, base) = (self.y - 11, self.y);
            let (colour, what) = (colour(*owner), label(*owner, image));
            self.put(format_args!(
                "<rect x=\"{LEFT}\" y=\"{top}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"{base}\" data-owner=\"{owner:?}\" data-bytes=\"{bytes}\">{} \
                 <tspan fill=\"#64748b\">{}, {}</tspan></text>",
                LEFT + 20,
                escaped(&what),
                amount(*bytes),
                percent(*bytes, len_bytes)
            ));
        }
    }
}

/// The colour and strength of a cell.
fn look(space: &Space, cell: usize) -> (&'static str, &'static str) {
    let start = cell as u64 * space.cell_bytes();
    let cell_bytes = space.cell_bytes().min(space.len_bytes() - start);
    let of = |share: &&Share| share.cells[cell];
    let seen = || space.shares().iter().filter(|share| !share.owner.is_blank() && share.cells[cell] > 0);
    let blank =
        space.shares().iter().find(|share| share.owner.is_blank()).map_or(Owner::Free, |share| share.owner);
    let Some(most) = seen().max_by_key(of) else { return (colour(blank), "1") };
    let bytes: u64 = seen().map(|share| share.cells[cell]).sum();
    let opacity = match u128::from(bytes) * 4 / u128::from(cell_bytes.max(1)) {
        0 => "0.4",
        1 => "0.6",
        2 | 3 => "0.8",
        _ => "1",
    };
    (colour(most.owner), opacity)
}

/// The lines of the legend: layers without a colour of their own are one.
fn grouped(space: &Space) -> Vec<(Owner, u64)> {
    let mut lines: Vec<(Owner, u64)> = Vec::new();
    for share in space.shares() {
        let owner = match share.owner {
            Owner::Layer(depth) => Owner::Layer(depth.min(LAYER_COLOURS.len())),
            owner => owner,
        };
        match lines.last_mut() {
            Some((last, bytes)) if *last == owner => *bytes += share.bytes,
            _ => lines.push((owner, share.bytes)),
        }
    }
    lines
}

fn amount(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{} ({bytes} bytes)", Human(bytes)) }
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(bytes: u64, of: u64) -> String {
    match bytes as f64 * 100.0 / of.max(1) as f64 {
        all if bytes == of => format!("{:.0} %", all.min(100.0)),
        little if bytes > 0 && little < 0.1 => "below 0.1 %".to_owned(),
        some => format!("{some:.1} %"),
    }
}

/// A name that fits into a line: its end says most.
fn shortened(name: &str) -> String {
    const MOST: usize = 80;
    let count = name.chars().count();
    if count <= MOST {
        name.to_owned()
    } else {
        format!("…{}", name.chars().skip(count - MOST).collect::<String>())
    }
}

/// Text in XML. What XML cannot have, whatever stands in a file's name, is shown as a replacement character.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
