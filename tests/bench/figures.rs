//! Figures: medians over rounds, a table for people, JSON lines for programs.

use serde::Serialize;

/// One figure of ours beside the peer's.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Ours.
    pub ours: f64,
    /// The peer's.
    pub peer: f64,
    /// Ours divided by the peer's.
    pub ratio: f64,
    /// Of both.
    pub unit: &'static str,
    /// Who the peer is.
    pub peer_name: String,
}

impl Figure {
    /// The medians of both sides' rounds, which must not be empty.
    pub fn of_rounds(name: &str, unit: &'static str, peer_name: &str, ours: &[f64], peer: &[f64]) -> Self {
        let (ours, peer) = (median(ours), median(peer));
        Self { name: name.to_owned(), ours, peer, ratio: ours / peer, unit, peer_name: peer_name.to_owned() }
    }
}

/// Prints all, as a table or as one JSON object per line.
pub fn print(figures: &[Figure], json: bool) {
    if json {
        for figure in figures {
            println!("{}", serde_json::to_string(figure).expect("numbers and texts"));
        }
        return;
    }
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or(4).max(4);
    println!("{:<width$}  {:>12}  {:>12}  {:>6}  {:<6}  peer is", "name", "ours", "peer", "ratio", "unit");
    for Figure { name, ours, peer, ratio, unit, peer_name } in figures {
        println!("{name:<width$}  {ours:>12.1}  {peer:>12.1}  {ratio:>6.2}  {unit:<6}  {peer_name}");
    }
}

fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }

    #[test]
    fn the_ratio_is_ours_divided_by_the_peer_s() {
        let figure = Figure::of_rounds("x", "iops", "peer", &[50.0], &[100.0]);
        assert!((figure.ratio - 0.5).abs() < f64::EPSILON);
    }
}
