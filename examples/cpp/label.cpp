// Label a picture by a network of `cen export --format aot`, without Python. README.md says how it is built.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

using Words = std::vector<std::string>;

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

// What stands behind a key's first place after `from`, in JSON as Python writes it: a list's words, or one.
Words words(const std::string& json, const std::string& key, size_t from = 0) {
  size_t at = json.find("\"" + key + "\": ", from);
  check(at != std::string::npos, "the package's metadata lacks " + key);
  at += key.size() + 4;
  const bool list = json.at(at) == '[';
  bool quoted = false;
  Words found;
  for (std::string word;; ++at) {
    const char c = json.at(at);
    if (c == '"' && json[at - 1] != '\\') {
      quoted = !quoted;
    } else if (quoted || std::string("[], }").find(c) == std::string::npos) {
      word += c;
    } else if (c == ',' || c == ']' || c == '}') {
      if (!word.empty()) found.push_back(word);
      word.clear();
      if (!list || c == ']') return found;
    }
  }
}

// Pixels [C, H, W], as stored, of a PPM (kind P6, 8 bits) or a PGM (P5, 8 or 16 bits).
at::Tensor read_image(const std::string& path, const std::string& kind, const Words& size) {
  std::ifstream file(path, std::ios::binary);
  check(file.good(), path + ": cannot be read");
  std::string found, comment;
  int64_t width = 0, height = 0, largest = 0;
  check(file >> found && found == kind, path + ": expected an image of kind " + kind);
  for (int64_t* number : {&width, &height, &largest}) {
    while ((file >> std::ws).peek() == '#') std::getline(file, comment);
    file >> *number;
  }
  file.get();
  check(file && largest > 0 && (kind == "P6" ? largest == 255 : largest < 65536), path + ": unknown header");
  check(size[0] == "null" || size == Words{std::to_string(height), std::to_string(width)},
        path + ": must be of " + size.back() + "x" + size[0] + " pixels, as the network was exported");
  const int64_t channels = kind == "P6" ? 3 : 1, bytes = largest > 255 ? 2 : 1;
  at::Tensor stored = at::empty({height, width, channels, bytes}, at::kByte);
  file.read(static_cast<char*>(stored.data_ptr()), stored.numel());
  check(file.gcount() == stored.numel(), path + ": ends before its last pixel");
  at::Tensor pixels = stored.select(3, 0).to(at::kFloat);
  if (bytes == 2) pixels = 256 * pixels + stored.select(3, 1);
  return pixels.permute({2, 0, 1});
}

// An image [C, H, W] as the network takes it, [1, 3, H, W]: normalized, missing depth 0; contiguous.
at::Tensor input(const at::Tensor& image, const std::string& json, const std::string& modality) {
  const size_t place = json.find("{\"name\": \"" + modality + "\"", json.find("\"inputs\": "));
  const std::string unit = modality == "rgb" ? "full brightness" : "metre";
  check(words(json, "unit", place)[0] == unit, modality + ": the network takes it in other units");
  const Words mean = words(json, "mean", place), deviation = words(json, "std", place);
  const at::Tensor x = image.clone();
  for (size_t c = 0; c < mean.size(); ++c) x[c].sub_(std::stof(mean[c])).div_(std::stof(deviation[c]));
  return (modality == "rgb" ? x : x.masked_fill(image == 0, 0)).expand({3, -1, -1}).unsqueeze(0).contiguous();
}

torch::inductor::AOTIModelPackageLoader load(const std::string& path) try {
  return torch::inductor::AOTIModelPackageLoader(path);
} catch (const std::exception& error) {
  throw std::runtime_error(path + ": " + error.what());
}

void label(const Words& arguments) {
  torch::inductor::AOTIModelPackageLoader network = load(arguments[0]);
  const std::string json = network.get_metadata()["cen_ext.json"];
  check(words(json, "modalities") == Words{"rgb", "depth"} && words(json, "outputs")[0] != "branches",
        arguments[0] + ": must be of rgb and depth, with --outputs ensemble");
  const Words size = words(json, "size");
  const Words classes = words(json, "classes", json.rfind("\"classes\""));  // Behind those of the layout.
  const std::string stored = words(json, "bit_shift")[0] == "0" ? words(json, "depth_scale")[0] : "null";
  const std::string scale = arguments.size() > 4 ? arguments[4] : stored;
  check(std::atof(scale.c_str()) > 0, "UNITS-PER-METER: expected a number above 0, got " + scale);
  const at::Tensor color = read_image(arguments[1], "P6", size) / 255;
  const at::Tensor depth = read_image(arguments[2], "P5", size) / std::stof(scale);
  check(color[0].sizes() == depth[0].sizes(), arguments[2] + ": is of another size than " + arguments[1]);
  std::vector<at::Tensor> inputs = {input(color, json, "rgb"), input(depth, json, "depth")};
  if (words(json, "form")[0] == "stacked") inputs = {at::cat(inputs)};
  network.run(inputs);  // The first run allocates what the second one finds.
  const auto start = std::chrono::steady_clock::now();
  const at::Tensor logits = network.run(inputs)[0];
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  const auto labels = at::upsample_bilinear2d(logits, color.sizes().slice(1), false).argmax(1).to(at::kByte);
  std::ofstream file(arguments[3], std::ios::binary);
  file << "P5\n" << color.size(2) << " " << color.size(1) << "\n255\n";
  file.write(static_cast<const char*>(labels.data_ptr()), labels.numel());
  check(file.flush().good(), arguments[3] + ": cannot be written");
  for (size_t k = 0; k < classes.size(); ++k)
    if (const double share = labels.eq(int64_t(k)).to(at::kDouble).mean().item<double>(); share > 0)
      std::printf("%5.1f %%  %s\n", 100 * share, classes[k].c_str());
  std::printf("%.1f ms\n", elapsed.count());
}

int main(int count, char** arguments) try {
  check(count == 5 || count == 6, "usage: label NET.pt2 RGB.ppm DEPTH.pgm LABELS.pgm [UNITS-PER-METER]");
  label(Words(arguments + 1, arguments + count));
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", std::string(error.what(), std::strcspn(error.what(), "\n")).c_str());
  return 1;
}
