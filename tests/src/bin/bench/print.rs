//! Tables, and what one must know of the machine to read them.

use std::fs;

use nix::sys::utsname::uname;

/// The machine, and how busy it is.
pub fn machine() {
    let kernel = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    println!("Linux {kernel}, {processors} processors");
    load_average("at the start");
}

/// The load of the machine.
pub fn load_average(when: &str) {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let one: Vec<&str> = text.split(' ').take(3).collect();
    println!("load {when}: {}", one.join(" "));
}

/// A table under a title: columns as wide as their widest cell; all but the first to the right.
pub fn table(title: &str, header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("   {cell:>width$}"),
        });
        println!("  {}", cells.collect::<String>().trim_end());
    };
    println!("\n{title}");
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}
