//! The ACPI tables are what the ACPI specification's own tools take them for.

use std::{fs, path::Path, process::Command};

use vmm_runner::machine::{AcpiHardware, AcpiTables, acpi_tables, layout};

/// Each table under its signature. The RSDP has none of its own.
fn tables(cpus: u32, hardware: AcpiHardware) -> Vec<(String, Vec<u8>)> {
    let base = layout::ACPI_TABLES.0;
    let AcpiTables { bytes, .. } =
        acpi_tables(base, layout::ACPI_TABLES_END, cpus, hardware).expect("they fit");
    let table = |address: u64| {
        let at = usize::try_from(address - base).expect("inside");
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().expect("four bytes"));
        let table = bytes[at..at + length as usize].to_vec();
        (String::from_utf8(table[..4].to_vec()).expect("text"), table)
    };
    let long = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let xsdt = table(long(&bytes[24..]));
    let mut all: Vec<_> = xsdt.1[36..].chunks(8).map(|entry| table(long(entry))).collect();
    let fadt = all.iter().find(|(name, _)| name == "FACP").expect("a FADT").1.clone();
    all.extend([xsdt, table(long(&fadt[140..]))]);
    if hardware == AcpiHardware::Full {
        all.push(table(long(&fadt[132..])));
    }
    all
}

/// Runs `iasl` and returns all that it says.
fn iasl(dir: &Path, arguments: &[&str]) -> String {
    let output =
        Command::new("iasl").args(arguments).current_dir(dir).output().expect("iasl (package acpica-tools)");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

fn assert_silent(what: &str, text: &str) {
    let bad = ["Error", "Warning", "Remark", "rror:", "arning:"];
    let said = text.lines().filter(|line| !line.contains("0 Errors, 0 Warnings, 0 Remarks"));
    let complaints: Vec<&str> = said.filter(|line| bad.iter().any(|word| line.contains(word))).collect();
    assert!(complaints.is_empty(), "{what}: {complaints:#?}\n{text}");
}

#[test]
fn iasl_has_nothing_to_say_about_the_tables() {
    let dir = tempfile::tempdir().expect("a directory");
    let full = AcpiHardware::Full;
    for (cpus, hardware) in [(1, AcpiHardware::Reduced), (254, AcpiHardware::Reduced), (1, full), (4, full)] {
        let tables = tables(cpus, hardware);
        let mut names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let facs: &[&str] = if hardware == full { &["FACS"] } else { &[] };
        assert_eq!(names, [&["APIC", "DSDT", "FACP"], facs, &["XSDT"]].concat());
        for (name, table) in &tables {
            let (binary, source) = (format!("{name}.aml"), format!("{name}.dsl"));
            fs::write(dir.path().join(&binary), table).expect("room");
            assert_silent(name, &iasl(dir.path(), &["-d", &binary]));
            fs::remove_file(dir.path().join(&binary)).expect("there");
            // What was made of it is a table again, the same one.
            assert_silent(name, &iasl(dir.path(), &["-oa", "-p", name, &source]));
            let again = fs::read(dir.path().join(&binary)).expect("compiled");
            // The compiler puts its own name and version into the header, and adds up anew.
            let has_header = name != "FACS";
            let is_same = |at: &usize| again.get(*at) == table.get(*at);
            let differs = (0..table.len())
                .find(|at| !is_same(at) && !(has_header && (*at == 9 || (28..36).contains(at))));
            assert_eq!((again.len(), differs), (table.len(), None), "{name} of {cpus} processors");
        }
    }
}
