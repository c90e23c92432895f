//! `img map`: where the guest's bytes live, layer by layer.

use clap::ValueHint;
use img_core::{
    format::OpenMode,
    image::Image,
    job::{
        bitmaps::marks,
        map::{MapEntry, map, marked_entries},
        plot::plot,
    },
    text,
};

use crate::{
    args::{FileArg, FormatArgs, Layout, Opening, OutputArgs, ShareArgs},
    context::Context,
    error::{Failure, Outcome, os_text},
    object::ObjectArgs,
    output::Out,
    picture::picture,
    size,
};

/// Show where the data of an image lives
#[derive(Debug, clap::Args)]
#[command(override_usage = "img map [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    formats: FormatArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    share: ShareArgs,

    /// First guest byte to describe
    #[arg(short = 's', long, value_name = "OFFSET")]
    start_offset: Option<String>,

    /// How many guest bytes to describe
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,

    /// Describe only what this persistent bitmap of the image marks
    #[arg(long, value_name = "BITMAP", help_heading = "Beyond qemu-img")]
    dirty_bitmap: Option<String>,

    /// Draw the guest's disk and the host files into an SVG file, instead of a list
    #[arg(long, value_name = "FILE.svg", value_hint = ValueHint::FilePath, help_heading = "Beyond qemu-img")]
    plot: Option<String>,

    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img map disk.qcow2
  img map --plot disk.svg disk.qcow2
  img map --output json --start-offset 1G --max-length 64M disk.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let bytes = |what, text: &Option<String>| match text {
        Some(text) => size::argument(what, text, size::MAX_BYTES).map(Some).map_err(Failure::new),
        None => Ok(None),
    };
    let start_bytes = bytes("start offset", &args.start_offset)?.unwrap_or(0);
    let length_bytes = bytes("max length", &args.max_length)?;
    let layout = args.output.layout()?;
    let is_part = args.start_offset.is_some() || args.max_length.is_some() || args.dirty_bitmap.is_some();
    if args.plot.is_some() && (is_part || args.output.is_given()) {
        return Err(Failure::new(
            "--plot shows the whole image in a form of its own: it does not go with --start-offset, --max-length, \
             --dirty-bitmap or --output",
        ));
    }
    args.objects.check(context)?;
    let file = args.file.one()?;
    let opening =
        Opening { force_share: args.share.force_share, ..Opening::new(file, &args.formats, OpenMode::Read) };
    let image = opening.open(context)?;

    if let Some(target) = &args.plot {
        return write_plot(&image, target);
    }
    let mut printer = Printer::new(layout, &context.out);
    let mut refused = None;
    let marks = args.dirty_bitmap.as_deref().map(|name| marks(&image, name)).transpose()?;
    let mut row = |entry: &MapEntry| {
        // What is printed once the reader has gone is for nobody.
        if context.out.is_closed() {
            return Err(img_core::Error::Cancelled);
        }
        printer.row(entry).map_err(|failure| {
            refused = Some(failure);
            img_core::Error::Cancelled
        })
    };
    let outcome = match &marks {
        None => map(&image, start_bytes, length_bytes, &mut row),
        Some(marks) => {
            marked_entries(&image, marks, start_bytes, length_bytes).try_for_each(|entry| row(&entry?))
        }
    };
    match (outcome, refused) {
        (_, Some(failure)) => Err(failure),
        (Err(_), None) if context.out.is_closed() => Ok(0),
        (Err(error), None) => {
            let text = format!("Could not read file metadata: {}", crate::error::reason(&error));
            Err(Failure::new(text).with_place(&error, context))
        }
        (Ok(()), None) => {
            printer.finish();
            Ok(0)
        }
    }
}

/// Draws the picture. It appears under its name when it is complete.
fn write_plot(image: &Image, target: &str) -> Outcome {
    let plot = plot(image).map_err(|error| {
        Failure::new(format!("Could not read file metadata: {}", crate::error::reason(&error)))
    })?;
    let path = text::to_path(target);
    let partial = text::to_path(&format!("{target}.{}.partial", std::process::id()));
    let written =
        std::fs::write(&partial, picture(&plot, image)).and_then(|()| std::fs::rename(&partial, path));
    if let Err(error) = written {
        // It may not have been made.
        std::fs::remove_file(&partial).ok();
        return Err(Failure::new(format!("Could not write '{target}': {}", os_text(&error))));
    }
    Ok(0)
}

/// Prints rows as a table or as one JSON array.
struct Printer<'a> {
    layout: Layout,
    out: &'a Out,
    rows: u64,
}

impl<'a> Printer<'a> {
    fn new(layout: Layout, out: &'a Out) -> Self {
        if layout == Layout::Human {
            out.line(format_args!("{:<16}{:<16}{:<16}{}", "Offset", "Length", "Mapped to", "File"));
        }
        if layout == Layout::Json {
            out.print("[");
        }
        Self { layout, out, rows: 0 }
    }

    fn row(&mut self, entry: &MapEntry) -> Result<(), Failure> {
        match self.layout {
            Layout::Json => self.json_row(entry),
            Layout::Human => self.table_row(entry)?,
        }
        self.rows += 1;
        Ok(())
    }

    fn json_row(&self, entry: &MapEntry) {
        self.out.print(if self.rows == 0 { "" } else { ",\n" });
        self.out.print(format_args!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
             \"data\": {}, \"compressed\": {}",
            entry.start_bytes,
            entry.length_bytes,
            entry.depth,
            entry.present,
            entry.zero,
            entry.data,
            entry.compressed
        ));
        if let Some(offset_bytes) = entry.offset_bytes {
            self.out.print(format_args!(", \"offset\": {offset_bytes}"));
        }
        self.out.print("}");
    }

    /// A row of the table, which has only data that stands as it is in a file.
    fn table_row(&self, entry: &MapEntry) -> Result<(), Failure> {
        if !entry.data {
            return Ok(());
        }
        let Some((offset_bytes, file)) = entry.offset_bytes.zip(entry.file.as_ref()) else {
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        };
        if !entry.zero {
            self.out.line(format_args!(
                "{:<16}{:<16}{:<16}{}",
                Hex(entry.start_bytes),
                Hex(entry.length_bytes),
                Hex(offset_bytes),
                text::from_path(file)
            ));
        }
        Ok(())
    }

    fn finish(&self) {
        if self.layout == Layout::Human {
            return;
        }
        self.out.line("]");
    }
}

/// C's `%#x`: zero has no prefix.
struct Hex(u64);

impl std::fmt::Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == 0 { f.pad("0") } else { f.pad(&format!("{:#x}", self.0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start_bytes: u64) -> MapEntry {
        MapEntry {
            start_bytes,
            length_bytes: 512,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset_bytes: Some(0),
            file: Some("a".into()),
        }
    }

    #[test]
    fn rows_are_laid_out_in_columns() {
        let out = Out::memory();
        let mut printer = Printer::new(Layout::Human, &out);
        printer.row(&entry(0x10000)).unwrap();
        printer.finish();
        assert_eq!(
            out.text(),
            "Offset          Length          Mapped to       File\n\
             0x10000         0x200           0               a\n"
        );
        let compressed = MapEntry { offset_bytes: None, ..entry(0) };
        assert!(printer.row(&compressed).is_err());
    }

    #[test]
    fn json_is_an_array_with_a_line_a_row() {
        let out = Out::memory();
        let mut printer = Printer::new(Layout::Json, &out);
        printer.row(&entry(0)).unwrap();
        printer.row(&entry(512)).unwrap();
        printer.finish();
        let text = out.text();
        assert!(text.starts_with("[{ \"start\": 0, \"length\": 512, \"depth\": 1, \"present\": true,"));
        assert!(text.ends_with(", \"offset\": 0}]\n"));
        assert_eq!(text.lines().count(), 2);
    }
}
