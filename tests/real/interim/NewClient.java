// Two requests of Java's HttpClient on a kept connection: prints what each got.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;

public class NewClient {
    public static void main(String[] urls) throws Exception {
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        List<String> found = new ArrayList<>();
        for (String url : urls) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(url)).timeout(Duration.ofSeconds(3))
                .header("Idempotency-Key", url).POST(HttpRequest.BodyPublishers.ofString("1")).build();
            try {
                HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
                found.add("[" + response.statusCode() + ", \"" + response.body().trim() + "\"]");
            } catch (Exception error) {
                found.add("\"" + error.getClass().getSimpleName() + "\"");
            }
        }
        System.out.println(found);
    }
}
